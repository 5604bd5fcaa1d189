"""Lowers launches to Triton's IR as a GPU's launcher would, with no GPU: the compiler's front end.

A launch specialises its arguments: the integer 1 and None become constants, so that a method called
on one (``n.to(tl.int64)``) exists for 2 and not for 1. The interpreter sees none of that. What the
compiler's later stages refuse (layouts, shared memory, ptxas) is not seen here either.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from _static import no_gpu_needed
from triton._C.libtriton import ir
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

# fp8 needs 89 or more. Up to Triton's IR all else is the same for all architectures.
CAPABILITY = 90

# The compiler must not see triton.language while the interpreter has exchanged its attributes.
LANGUAGE = threading.Lock()

_lowered: set[tuple[JITFunction, str]] = set()


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
    def types_and_constants(self) -> str:
        """All that can make lowering fail; not which arguments are divisible by 16."""
        return f"{self.source.signature} {self.source.constants}"

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
            names = list(self.source.signature)
            constants = {names[path[0]]: value for path, value in self.source.constants.items()}
            raise LoweringError(
                f"{self.source.name} does not compile with {constants}: {error}"
            ) from error


def specialise(
    kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], capability: int = CAPABILITY
) -> Specialisation:
    """By the launcher's own binder, which Triton 3.6 to 3.9 have."""
    with no_gpu_needed(capability):
        _, _, target, backend, bind = kernel.device_caches[capability]
    bound, specialisation, options = bind(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(
        backend, kwargs, bound, specialisation, options
    )
    return Specialisation(
        ASTSource(kernel, signature, constants, attributes), options, backend, target
    )


def lower_once(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What this process has lowered already is not lowered again."""
    found = specialise(kernel, args, kwargs)
    key = kernel, found.types_and_constants
    if key not in _lowered:
        with LANGUAGE:
            found.lower()
        _lowered.add(key)
