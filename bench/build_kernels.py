"""Compiles every configuration in the kernels' launch tables ahead of time, with no GPU.

    python setup.py build_kernels                        # sm_80, sm_90 and sm_100, on all cores
    python setup.py build_kernels --arch=90 --only='attention*'

One process for each case of ``kernel_cases.py`` and architecture, run by ninja: in parallel, and
again only when the sources that the case's op imports, the case itself, this tool, Triton or
PyTorch have changed. ``build/kernels/manifest.json`` holds, for each kernel configuration, its
registers, spills, shared memory, occupancy, instructions, main loop and predicted cycles.

The exit code is 1, and each culprit is named, where a kernel spills a register, needs more shared
or tensor memory than the architecture has, or multiplies without its tensor cores.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import _command
import torch
import triton
from _sass import MATRIX
from rich import box
from rich.console import Console
from rich.table import Table

_BENCH = Path(__file__).resolve().parent
_ROOT = _BENCH.parent
CASES = _BENCH / "kernel_cases.py"
OUT = _ROOT / "build" / "kernels"
_TOOL = [_BENCH / name for name in ("_sass.py", "_multiprocessor.py", "_static.py")]
_COPIES = ("LDGSTS", "TMA_LOAD", "TMA_STORE")


@dataclass
class Options:
    """Compile every kernel configuration ahead of time, with no GPU."""

    arch: tuple[Literal[80, 86, 89, 90, 100, 120], ...] = (80, 90, 100)
    """Compute capabilities."""
    jobs: int = os.cpu_count() or 1
    """Processes at a time, 1 or more."""
    only: str = "*"
    """Cases whose names match this pattern: 'attention*', say."""


@dataclass(frozen=True)
class Edge:
    """One case on one architecture."""

    case: str
    capability: int
    key: str  # changes when the case or a compiler does
    inputs: list[Path]

    def output(self, out: Path) -> Path:
        return out / f"{self.case}.sm_{self.capability}.json"


# ------------------------------------------------------------------------- what a case depends on


def _definition(run: partial[object]) -> str:
    """Source of a case's function, and of the functions and constants of its file that it uses."""
    function: FunctionType = run.func  # type: ignore[assignment]
    file = function.__globals__
    found: dict[str, str] = {}
    todo = [function.__name__]
    while todo:
        name = todo.pop()
        value = file.get(name)
        if name in found:
            continue
        if isinstance(value, FunctionType) and value.__module__ == file["__name__"]:
            found[name] = textwrap.dedent(inspect.getsource(value))
            tree = ast.parse(found[name])
            todo += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        elif isinstance(value, (bool, int, float, str, tuple, dict)):
            found[name] = repr(value)
    return "\n".join(found[name] for name in sorted(found))


def _imported(code: str, folder: Path) -> set[Path]:
    """Files of kernels, and of modules beside the cases, that the code imports, by others too."""
    found: set[Path] = set()
    todo = [code]
    while todo:
        for module in _modules(todo.pop()):
            package, _, name = module.rpartition(".")
            home = {"fastgpt.kernels": _ROOT / "kernels", "": folder}.get(package)
            path = home / f"{name}.py" if home is not None else None
            if path is not None and path not in found and path.exists():
                found.add(path)
                todo.append(path.read_text())
    return found


def _modules(code: str) -> Iterator[str]:
    """What the code imports; ``from a import b`` may be the module a or a.b."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def edges(cases: Path, architectures: Iterable[int]) -> list[Edge]:
    """Of a file that defines ``CASES``: name → ``functools.partial``; and perhaps
    ``LEAST_CAPABILITY``: name → the first architecture that can run the case."""
    spec = importlib.util.spec_from_file_location(cases.stem, cases)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    least = getattr(module, "LEAST_CAPABILITY", {})
    versions = (sys.version, torch.__version__, triton.__version__)
    found = []
    for case, run in module.CASES.items():
        definition = _definition(run)
        key = hashlib.sha256(
            repr((definition, run.args, run.keywords, versions)).encode()
        ).hexdigest()[:16]
        inputs = sorted({*_TOOL, *_imported(definition, cases.parent)})
        able = [c for c in architectures if c >= least.get(case, 0)]
        found += [Edge(case, capability, key, inputs) for capability in able]
    return found


# ----------------------------------------------------------------------------------------- ninja


def _ninja_file(cases: Path, out: Path, found: Iterable[Edge]) -> str:
    program = _escaped(shlex.join([sys.executable, str(cases)]))
    lines = [
        f"builddir = {_escaped(out)}",
        "rule compile",
        f"  command = {program} $case $arch $key $out",
        "  description = $case sm_$arch",
    ]
    for edge in found:
        inputs = " ".join(map(_escaped, edge.inputs))
        lines += [
            f"build {_escaped(edge.output(out))}: compile | {inputs}",
            f"  case = {edge.case}",
            f"  arch = {edge.capability}",
            f"  key = {edge.key}",
        ]
    return "\n".join(lines) + "\n"


def _escaped(text: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(text))


def _ninja() -> str:
    """The program: of the package ninja in this environment, else of the system."""
    program = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    program = program or shutil.which("ninja")
    if program is None:
        raise FileNotFoundError("ninja is not installed: pip install ninja")
    return program


def build(
    cases: Path, out: Path, *, arch: Iterable[int], jobs: int, only: str = "*"
) -> list[dict[str, Any]]:
    """Compile what is out of date; the record of each case and architecture.

    Args:
        cases: a file like ``kernel_cases.py``.
        out: folder for the records, ``build.ninja`` and ``manifest.json``.

    Raises:
        ValueError: ``only`` matches no case, or ``jobs`` is not positive.
        FileNotFoundError: ninja is not installed.
        CompilationError: a case failed; what it printed was passed on.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    every = edges(cases, sorted(set(arch)))
    chosen = [edge for edge in every if fnmatch.fnmatchcase(edge.case, only)]
    if not chosen:
        names = ", ".join(sorted({edge.case for edge in every}))
        raise ValueError(f"only must match a case, got {only!r}; there are {names}")
    out.mkdir(parents=True, exist_ok=True)
    script = out / "build.ninja"
    script.write_text(_ninja_file(cases, out, every))
    search = [str(_ROOT), str(_BENCH), *filter(None, [os.environ.get("PYTHONPATH")])]
    targets = [str(edge.output(out)) for edge in chosen]
    status = subprocess.run(
        [_ninja(), "-f", str(script), "-j", str(jobs), "-k", "0", *targets],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1"},
    ).returncode
    if status:
        raise CompilationError(f"ninja failed with exit code {status}")
    records = [json.loads(edge.output(out).read_text()) for edge in chosen]
    manifest = {"triton": triton.__version__, "torch": torch.__version__, "cases": records}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    return records


class CompilationError(RuntimeError):
    """A case could not be compiled."""


# ----------------------------------------------------------------------------------------- report


def table(records: Iterable[Mapping[str, Any]]) -> Table:
    """One row a kernel and architecture: the range over its configurations."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    out.add_column("kernel\n", overflow="fold")
    headers = "sm\n", "con-\nfigs", "registers\n", "spilled\nbytes", "shared\nKB", "programs\n/SM"
    for header in headers:
        out.add_column(header, justify="right", no_wrap=True)
    out.add_column("matrix, copies\n")
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        for kernel in record["kernels"]:
            groups.setdefault((kernel["name"], kernel["capability"]), []).append(kernel)
    for (name, capability), kernels in sorted(groups.items()):
        spilled = [k["spill_store_bytes"] + k["spill_load_bytes"] for k in kernels]
        found = {kind for kernel in kernels for kind in kernel["instructions"]}
        out.add_row(
            name.strip("_").removesuffix("_kernel"),
            str(capability),
            str(len(kernels)),
            _range([k["registers"] for k in kernels]),
            str(max(spilled)),
            f"{max(k['shared_memory'] for k in kernels) / 1024:.0f}",
            _range([k["occupancy"]["programs"] for k in kernels]),
            " ".join(kind for kind in (*MATRIX, *_COPIES) if kind in found) or "-",
        )
    return out


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 where a kernel is faulty or does not compile, 2 for a wrong argument."""
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    try:
        o = _command.tyro().cli(Options, args=argv)
        records = build(CASES, OUT, arch=o.arch, jobs=o.jobs, only=o.only)
    except (ValueError, FileNotFoundError, ModuleNotFoundError, CompilationError) as error:
        errors.print(f"error: {error}", style="bold red")
        return 1 if isinstance(error, CompilationError) else 2
    console = Console(highlight=False)
    console.print(table(records))
    console.print(f"wrote {OUT / 'manifest.json'}", soft_wrap=True)
    faults = [
        f"{record['case']}: {fault}"
        for record in records
        for kernel in record["kernels"]
        for fault in kernel["faults"]
    ]
    for fault in faults:
        errors.print(fault, style="red")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
