"""Which branches of the kernels' source a set of launches covers, without full compilation.

``lowering(capability)`` redirects launches: each new specialisation is lowered to Triton's IR (some
tens of milliseconds), and the ways taken of every ``if`` and conditional expression are recorded.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.code_generator import CodeGenerator
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from tests.tools.ptx import launches

_Branch = ast.If | ast.IfExp


@dataclass(frozen=True)
class Outcome:
    """One way, "then" or "else", of a branch in a jit function."""

    path: str
    line: int
    column: int
    way: str

    def __str__(self) -> str:
        """E.g. "gemm_kernels.py, then: if TMA"."""
        for node in ast.walk(ast.parse(Path(self.path).read_text())):
            if isinstance(node, _Branch) and (node.lineno, node.col_offset) == (
                self.line,
                self.column,
            ):
                test = ast.unparse(node.test)
                whole = f"if {test}" if isinstance(node, ast.If) else ast.unparse(node)
                return f"{Path(self.path).name}, {self.way}: {whole}"
        raise LookupError(f"no branch at {self.path}:{self.line}")


@dataclass
class Coverage:
    outcomes: set[Outcome] = field(default_factory=set)
    # Kernel → a set of its pointers' element types for each specialisation
    dtypes: dict[str, set[frozenset[str]]] = field(default_factory=lambda: defaultdict(set))


def branches(folder: Path) -> tuple[set[str], set[Outcome]]:
    """Names of the jit functions in a folder, and both ways of all their branches."""
    names: set[str] = set()
    outcomes: set[Outcome] = set()
    for path in sorted(folder.glob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and _is_jit(function):
                names.add(function.name)
                for node in ast.walk(function):
                    if isinstance(node, _Branch):
                        place = str(path.resolve()), node.lineno, node.col_offset
                        outcomes |= {Outcome(*place, "then"), Outcome(*place, "else")}
    return names, outcomes


def _is_jit(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).startswith("triton.jit") for d in function.decorator_list)


def _first(block: ast.expr | list[ast.stmt]) -> ast.AST | None:
    return (block[0] if block else None) if isinstance(block, list) else block


class _Recorder:
    """Replaces ``CodeGenerator.visit``, which visits every node that is compiled."""

    def __init__(self, outcomes: set[Outcome]) -> None:
        self._outcomes = outcomes
        self._open: list[tuple[_Branch, set[str]]] = []
        self._visit = CodeGenerator.visit

    def runtime(self, compile_if: Any) -> Any:
        """Wraps the compilation of a runtime ``if``, which compiles both ways."""

        def compile_both(generator: CodeGenerator, condition: Any, node: ast.If) -> Any:
            self._open[-1][1].update(("then", "else"))
            return compile_if(generator, condition, node)

        return compile_both

    def __call__(self, generator: CodeGenerator, node: ast.AST) -> Any:
        for branch, taken in self._open[-1:] if node else []:  # Triton 3.6 visits None too
            taken |= {
                way
                for way, block in (("then", branch.body), ("else", branch.orelse))
                if _first(block) is node
            }
        if not isinstance(node, _Branch):
            return self._visit(generator, node)
        self._open.append((node, set()))
        out = self._visit(generator, node)
        _, taken = self._open.pop()
        if isinstance(node, ast.If) and not node.orelse and "then" not in taken:
            taken = {"else"}
        line = generator.begin_line + node.lineno
        path = str(Path(generator.file_name).resolve())
        self._outcomes |= {Outcome(path, line, node.col_offset, way) for way in taken}
        return out


@contextmanager
def lowering(capability: int) -> Iterator[Coverage]:
    """Lower launches on CPU tensors without running them: their outputs are uninitialised."""
    coverage = Coverage()
    seen: set[tuple[str, str]] = set()
    recorder = _Recorder(coverage.outcomes)
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)

    def lower(
        self: JITFunction, key: str, signature: dict, device: Any, constexprs: dict, options: Any,
        attrs: Any, warmup: bool,
    ) -> None:  # fmt: skip
        name = self.__name__
        if (name, key) in seen:
            return
        seen.add((name, key))
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
        source = ASTSource(self, signature, constexprs, attrs)
        source.make_ir(target, options, functions, modules, context)
        coverage.dtypes[name].add(_element_types(signature))

    def run(kernel: JITFunction, args: tuple, kwargs: dict, grid: Any, capability: int) -> None:
        with launches.compiling_for(capability, device=f"lowering for sm_{capability}"):
            launches.specialise(kernel, args, kwargs)

    with pytest.MonkeyPatch.context() as patch, launches.compiled_for(capability, run):
        patch.setattr(JITFunction, "_do_compile", lower)
        patch.setattr(CodeGenerator, "visit", lambda self, node: recorder(self, node))
        for name in ("visit_if_scf", "visit_if_top_level"):
            patch.setattr(CodeGenerator, name, recorder.runtime(getattr(CodeGenerator, name)))
        yield coverage


def _element_types(signature: Any) -> frozenset[str]:
    """Element types of pointers and tensor descriptors, including those in tuples."""
    out: set[str] = set()
    for kind in signature.values() if isinstance(signature, dict) else signature:
        if isinstance(kind, (tuple, list)):
            out |= _element_types(kind)
        elif kind.startswith("*"):
            out.add(kind.strip("*k"))
        elif kind.startswith("tensordesc<"):
            out.add(kind.removeprefix("tensordesc<").partition("[")[0])
    return frozenset(out)
