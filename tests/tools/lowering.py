"""Lowers launches to Triton's IR as a GPU's launcher would, with no GPU: the compiler's front end.

A launch specialises its arguments: the integer 1 and None become constants, so that a method called
on one (``n.to(tl.int64)``) exists for 2 and not for 1. The interpreter sees none of that. What the
compiler's later stages refuse (layouts, shared memory, ptxas) is not seen here either.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from triton._C.libtriton import ir
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

from bench._compile.static import no_gpu_needed

# fp8 needs 89 or more. Up to Triton's IR all else is the same for all architectures.
CAPABILITY = 90

# Held for a whole interpreted launch: neither the compiler nor another launch may see
# triton.language while the interpreter has exchanged its attributes.
LANGUAGE = threading.RLock()

_lowered: set[str] = set()  # kinds
_launched: set[tuple[Any, str]] = set()  # a kernel's function, what the launcher specialises it to


class LoweringError(AssertionError):
    """Names the kernel, the constants and types it was specialised to, and Triton's error."""


@dataclass(frozen=True)
class Specialisation:
    """One program of a kernel: what a GPU's launcher compiles for these arguments."""

    source: ASTSource
    options: Any
    backend: BaseBackend
    target: GPUTarget

    @property
    def kinds(self) -> list[str]:
        """Of each argument what decides whether the program lowers: its type and, of a constant,
        which value. It does not matter whether it is divisible by 16, nor how large a constant past
        1 is unless it becomes a block's shape: a power of two then, and not below 16 for a product.
        The two half precisions count as one."""
        found = [
            f"{name}: {kind}".replace("bf16", "fp16")
            for name, kind in self.source.signature.items()
        ]
        for (number, *part), value in self.source.constants.items():
            found[number] += f" {part} {_kind(value)}"
        return found

    @property
    def kind(self) -> str:
        """Programs of one kind lower, or none of them does."""
        return f"{self.source.name} {self.kinds}"

    @property
    def program(self) -> str:
        """What the launcher knows a program by, on one architecture; but the two half precisions
        count as one, and it does not matter which arguments are divisible by 16."""
        o, types = self.options, str(self.source.signature).replace("bf16", "fp16")
        settings = o.num_warps, o.num_stages, o.maxnreg
        return f"{self.source.name} {types} {self.source.constants} {settings}"

    def __str__(self) -> str:
        names = list(self.source.signature)
        constants = {names[path[0]]: value for path, value in self.source.constants.items()}
        return f"{self.source.name} with {constants}"

    def lower(self) -> Any:
        """The module in Triton's IR; LoweringError where there is none."""
        context = ir.context()
        ir.load_dialects(context)
        self.backend.load_dialects(context)
        functions = self.backend.get_codegen_implementation(self.options)
        modules = self.backend.get_module_map()
        try:
            return self.source.make_ir(self.target, self.options, functions, modules, context)
        except TritonError as error:
            raise LoweringError(f"{self} does not compile: {error}") from error

    def compile(self) -> dict[str, Any]:
        """All stages but the assembler; what they found out, ``shared`` bytes for instance."""
        stages: dict[str, Any] = {}
        self.backend.add_stages(stages, self.options, self.source.language)
        metadata = {"target": self.target, **self.options.__dict__}
        module = self.lower()
        for stage in ("ttir", "ttgir", "llir", "ptx"):
            module = stages[stage](module, metadata)
        return metadata


def _kind(constant: Any) -> str:
    if isinstance(constant, int) and constant > 1:
        power = constant & (constant - 1) == 0
        return ("a power of two" if power else "none") + (" below 16" if constant < 16 else "")
    return str(constant)


def _bound(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int
) -> tuple[GPUTarget, BaseBackend, tuple[Any, Any, Any]]:
    """Arguments, what they are specialised to, and options, by the launcher's own binder, which
    Triton 3.6 to 3.9 have."""
    if capability not in kernel.device_caches:
        with no_gpu_needed(capability):
            kernel.device_caches[capability]
    _, _, target, backend, bind = kernel.device_caches[capability]
    return target, backend, bind(*args, **kwargs)


def specialise(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int = CAPABILITY
) -> Specialisation:
    target, backend, (bound, specialisation, options) = _bound(kernel, args, kwargs, capability)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialisation, options
    )
    return Specialisation(
        ASTSource(kernel, signature, constants, attributes), options, backend, target
    )


def lower_once(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Nothing of a kind that this process has lowered already: that is 50 ms each."""
    with LANGUAGE:
        _, _, (_, *specialisation) = _bound(kernel, args, kwargs, CAPABILITY)
        launch = kernel.fn, str(specialisation)  # to tell the kind takes longer
        if launch in _launched:
            return
        found = specialise(kernel, args, kwargs)
        if found.kind not in _lowered:
            found.lower()
            _lowered.add(found.kind)
        _launched.add(launch)
