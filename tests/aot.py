"""Compiles a kernel ahead of time, with no GPU, for any NVIDIA architecture, and reports what the
assembler and the machine code say: registers, spills, shared memory, kinds of instructions.

The specialisation is the launcher's own (arguments equal to 1, divisible by 16, of 64 bits, ...): a
stub answers in place of the GPU driver, and ``kernel.warmup()`` does the rest.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Bytes of shared memory that one program may have, by compute capability (CUDA C++ Programming
# Guide, technical specifications per compute capability).
MAX_SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}

# What tells how a kernel computes and loads, by the beginning of the opcode.
_INSTRUCTION_CLASSES = {
    "HMMA": r"[HIDQO]MMA",  # tensor cores from the registers of a warp
    "HGMMA": r"[HIQB]GMMA",  # wgmma: tensor cores of sm_90 from shared memory
    "TC5MMA": r"UTC\w*MMA",  # tcgen05: tensor cores of sm_100
    "LDGSTS": r"LDGSTS",  # cp.async: global to shared memory, past the registers
    "TMA_LOAD": r"UTMALDG|UBLKCP",  # tensor memory accelerator
    "TMA_STORE": r"UTMASTG|UTMAREDG",
    "LOCAL": r"LDL|STL",  # local memory, where spilled registers and arrays go
}

_NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture."""

    registers: int  # per thread
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    shared_memory: int  # bytes per program; MAX_SHARED_MEMORY says how much there is
    instructions: Counter[str]  # how many of each class: HMMA, HGMMA, TC5MMA, LDGSTS, TMA_LOAD, ...


class _StubDriver:
    """As much of a GPU driver as compiling needs. The device's number is its capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def _no_gpu_needed(kernel: JITFunction, capability: int) -> Iterator[None]:
    previous = driver._active  # the public property would look for a GPU
    driver.set_active(_StubDriver(capability))
    try:
        yield
    finally:
        driver._active = previous
        kernel.device_caches.pop(capability, None)


def compile_kernel(
    kernel: JITFunction,
    args: Sequence[Any],
    *,
    constexprs: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    capability: int,
) -> Compiled:
    """Compile as ``kernel[grid](*args, **constexprs, num_warps=..., num_stages=...)`` would.

    ``args``: the runtime arguments in order. A tensor may lie on any device, "meta" included; a
    torch.dtype stands for a 16-byte aligned tensor. ``capability``: 80, 90, 100, ...
    """
    assembler_log = io.StringIO()
    with (
        _no_gpu_needed(kernel, capability),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(assembler_log),
    ):
        knobs.compilation.always_compile = True  # a cached kernel comes without the log
        knobs.nvidia.dump_ptxas_log = True
        compiled = kernel.warmup(
            *args, grid=(1,), **constexprs, num_warps=num_warps, num_stages=num_stages
        )
    log = assembler_log.getvalue()
    return Compiled(
        registers=_number(r"Used (\d+) registers", log),
        spill_store_bytes=_number(r"(\d+) bytes spill stores", log),
        spill_load_bytes=_number(r"(\d+) bytes spill loads", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        shared_memory=compiled.metadata.shared,
        instructions=_classes(_opcodes(compiled.asm["cubin"])),
    )


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"no match for {pattern!r} in the log of ptxas:\n{log}")
    return int(found[1])


def _opcodes(cubin: bytes) -> list[str]:
    """The machine code's opcodes, in order: "LDG.E.128", "HGMMA.64x64x16.F32.BF16", ..."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [_NVDISASM, "--print-code", file.name], check=True, capture_output=True, text=True
        ).stdout
    # "        /*0a10*/              @!P0 BRA `(.L_x_1) ;"
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", listing, re.M)
    if not opcodes:
        raise RuntimeError(f"nvdisasm listed no instructions:\n{listing[:1000]}")
    return opcodes


def _classes(opcodes: list[str]) -> Counter[str]:
    return Counter(
        name
        for opcode in opcodes
        for name, pattern in _INSTRUCTION_CLASSES.items()
        if re.match(pattern, opcode)
    )
