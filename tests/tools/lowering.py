"""Lowers launches to Triton's IR like a GPU's launcher, without a GPU: the compiler's front end.

A launch specialises its arguments: the integer 1 and None become constants, so a method call like
``n.to(tl.int64)`` works for 2 but not for 1. The interpreter cannot see that. Errors of the
compiler's later stages (layouts, shared memory, ptxas) are not seen here either.
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

# fp8 needs at least 89. All else is the same on all architectures up to Triton's IR.
CAPABILITY = 90

# Held for a whole interpreted launch: neither the compiler nor another launch may use
# triton.language while the interpreter has patched it.
LANGUAGE = threading.RLock()

_lowered: set[str] = set()  # kinds
_launched: set[tuple[Any, str]] = set()  # a kernel's function, its specialisation


class LoweringError(AssertionError):
    """The message names the kernel, its constants and types, and Triton's error."""


@dataclass(frozen=True)
class Specialisation:
    """The program that a GPU's launcher would compile for these arguments."""

    source: ASTSource
    options: Any
    backend: BaseBackend
    target: GPUTarget

    @property
    def kinds(self) -> list[str]:
        """The properties of each argument that decide whether the program lowers: the type and, for
        constants, the value. Divisibility by 16 has no influence. Of constants above 1 it only
        matters whether they are a power of two, which block sizes must be, and below 16, which the
        block sizes of a product must not be. The two half-precision dtypes count as one."""
        found = [
            f"{name}: {kind}".replace("bf16", "fp16")
            for name, kind in self.source.signature.items()
        ]
        for (number, *part), value in self.source.constants.items():
            found[number] += f" {part} {_kind(value)}"
        return found

    @property
    def kind(self) -> str:
        """Either all programs of one kind lower or none."""
        return f"{self.source.name} {self.kinds}"

    @property
    def program(self) -> str:
        """The launcher's key of a program on one architecture, but both half-precision dtypes count
        as one and divisibility by 16 is ignored."""
        o, types = self.options, str(self.source.signature).replace("bf16", "fp16")
        settings = o.num_warps, o.num_stages, o.maxnreg
        return f"{self.source.name} {types} {self.source.constants} {settings}"

    def __str__(self) -> str:
        names = list(self.source.signature)
        constants = {names[path[0]]: value for path, value in self.source.constants.items()}
        return f"{self.source.name} with {constants}"

    def lower(self) -> Any:
        """The module in Triton's IR; raises LoweringError if there is none."""
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
        """Run all stages except the assembler; return their metadata, e.g. ``shared`` bytes."""
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
    """Arguments, their specialisation, and options, from the launcher's own binder (Triton 3.6 to
    3.9)."""
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
    """Lower the launch unless this process has already lowered one of its kind: it takes 50 ms."""
    with LANGUAGE:
        _, _, (_, *specialisation) = _bound(kernel, args, kwargs, CAPABILITY)
        launch = kernel.fn, str(specialisation)  # faster to compute than the kind
        if launch in _launched:
            return
        found = specialise(kernel, args, kwargs)
        if found.kind not in _lowered:
            found.lower()
            _lowered.add(found.kind)
        _launched.add(launch)
