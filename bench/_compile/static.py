"""Compiles kernels for any NVIDIA architecture and analyses the code, without a GPU.

``recorded`` records the launches of the ops. ``compile_launches`` compiles them ahead of time with
Triton's own specialisation (arguments equal to 1, divisible by 16, of 64 bits, ...): a stub
replaces the GPU driver, and ``kernel.warmup()`` does the rest.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench._compile.multiprocessor import (
    ARCHITECTURES,
    RESERVED_SHARED_MEMORY,
    TENSOR_MEMORY,
    programs_that_fit,
)
from fastgpt.kernels import _host

# Kind of instruction → its prefix in PTX. Matrix products of a warp from registers, of a warp group
# from shared memory (sm_90), of a program into tensor memory (sm_100). Then copies between global
# and shared memory that bypass registers, by threads and by the tensor memory accelerator.
MATRIX = {
    "mma": r"mma\.sync\.",
    "wgmma": r"wgmma\.mma_async\.",
    "tcgen05": r"tcgen05\.mma\.",
}
COPIES = {
    "cp.async": r"cp\.async\.c[ag]\.",
    "TMA load": r"cp\.async\.bulk\.tensor\.\S*\.shared::\w+\.global",
    "TMA store": r"cp\.async\.bulk\.tensor\.\S*\.global\.shared::",
}


@dataclass(frozen=True)
class Launch:
    """``kernel[grid](*args, **options)``. Tensors in ``args`` may be on any device, including
    "meta"; a torch.dtype stands for a 16-byte aligned tensor."""

    kernel: JITFunction
    args: tuple[Any, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Compiled:
    """One kernel on one architecture."""

    name: str
    capability: int
    options: str  # the constant arguments, warps and stages, as text
    registers: int  # per thread
    spilled: int  # bytes stored and loaded
    serialised: str | None  # why ptxas serialises the wgmma instructions
    shared_memory: int  # bytes per program
    tensor_memory: int  # columns per program, sm_100
    programs: int  # that fit on a multiprocessor
    instructions: Counter[str]  # number of each kind in MATRIX and COPIES
    half_products: tuple[int, ...]  # rows of each 16-bit matrix product in the source

    def __str__(self) -> str:
        return f"{self.name} on sm_{self.capability} ({self.options})"


def max_shared_memory(capability: int) -> int:
    """The limit in bytes per program. The launch tables for sm_80 also serve sm_86 and sm_89."""
    family = (80, 86, 89) if capability == 80 else (capability,)
    return min(ARCHITECTURES[c].shared_memory for c in family) - RESERVED_SHARED_MEMORY


def faults(compiled: Compiled) -> list[str]:
    """The faults that fail the build, each with the kernel, its configuration and the value."""
    found = []
    if compiled.spilled:
        found.append(f"spills {compiled.spilled} bytes")
    if compiled.serialised is not None:
        found.append(f"waits for each wgmma before the next: {compiled.serialised}")
    limit = max_shared_memory(compiled.capability)
    if compiled.shared_memory > limit:
        found.append(f"needs {compiled.shared_memory} bytes of shared memory, of {limit}")
    if compiled.tensor_memory > TENSOR_MEMORY:
        found.append(f"needs {compiled.tensor_memory} columns of tensor memory, of {TENSOR_MEMORY}")
    found += _missing_tensor_cores(compiled)
    return [f"{compiled}: {fault}" for fault in found]


def _missing_tensor_cores(compiled: Compiled) -> list[str]:
    """16-bit products of 64 rows or more must use the architecture's instruction, others mma."""
    own = ARCHITECTURES[compiled.capability].tensor_cores
    used = {own if rows >= 64 else "mma" for rows in compiled.half_products}
    missing = [f"{kind} is missing" for kind in sorted(used) if not compiled.instructions[kind]]
    if used == {own} and own != "mma" and compiled.instructions["mma"]:
        missing.append(f"mma where {own} is possible")
    return missing


# ------------------------------------------------------------------------------------ recording


@contextlib.contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Context in which the ops accept CPU tensors and choose launches for ``capability``, which are
    recorded in the list and not executed."""
    launches: list[Launch] = []

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, args, options))

    multiprocessors = ARCHITECTURES[capability].multiprocessors
    with (
        mock.patch.object(JITFunction, "run", note),
        _host.interpreted(True, capability, multiprocessors),
    ):
        yield launches


# ------------------------------------------------------------------------------------ compiling


class _StubDriver:
    """The part of a GPU driver that compiling needs. The device index is the capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def no_gpu_needed(capability: int) -> Iterator[None]:
    previous = driver._active  # the public property would look for a GPU
    driver.set_active(_StubDriver(capability))
    try:
        yield
    finally:
        driver._active = previous


def compile_launches(
    launches: Iterable[Launch], capability: int, cache: Path | None = None
) -> list[Compiled]:
    """Compile each launch for ``capability`` (80, 90, 100, ...), and return each distinct binary
    once. ``cache``: a folder that keeps the binaries and the assembler's logs."""
    launches = list(launches)
    found: dict[int, tuple[Any, str]] = {}  # by identity, since Triton caches its binaries
    with (
        no_gpu_needed(capability),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        knobs.cache.scope(),
        tempfile.TemporaryDirectory() as temporary,
    ):
        folder = Path(temporary) if cache is None else cache
        knobs.cache.dir = str(folder)
        knobs.nvidia.dump_ptxas_log = True
        try:
            for launch in launches:
                binary, log = _warmed_up(launch, capability, folder)
                found.setdefault(id(binary), (binary, log))
        finally:
            for launch in launches:
                launch.kernel.device_caches.pop(capability, None)
    return [_examine(binary, log, capability) for binary, log in found.values()]


def _warmed_up(launch: Launch, capability: int, folder: Path) -> tuple[Any, str]:
    """The compiled kernel and the assembler's log, which is stored under Triton's hash."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        binary = launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)
    path = folder / f"{binary.hash}.log"
    if log := printed.getvalue():
        partial = path.with_suffix(f".{os.getpid()}")  # other processes may write the same log
        partial.write_text(log)
        partial.replace(path)
    elif not path.exists():  # compiled by a process that was stopped before it wrote the log
        launch.kernel.device_caches.pop(capability, None)
        with knobs.compilation.scope():
            knobs.compilation.always_compile = True
            return _warmed_up(launch, capability, folder)
    return binary, path.read_text()


def _examine(binary: Any, log: str, capability: int) -> Compiled:
    metadata, names = binary.metadata, list(binary.src.signature)
    options = {
        names[path[0]]: value
        for path, value in binary.src.constants.items()
        if len(path) == 1 and value is not None  # longer paths are elements of a tuple
    }
    options |= {"num_warps": metadata.num_warps, "num_stages": metadata.num_stages}
    registers = _number(r"Used (\d+) registers", log)
    tensor_memory = getattr(metadata, "tmem_size", 0) or 0
    serialised = re.search(r"wgmma\S* instructions are serialized due to (.*?) (in|for) the", log)
    return Compiled(
        name=metadata.name,
        capability=capability,
        options=", ".join(f"{name}={value}" for name, value in options.items()),
        registers=registers,
        spilled=sum(_number(rf"(\d+) bytes spill {way}", log) for way in ("stores", "loads")),
        serialised=serialised[1] if serialised else None,
        shared_memory=metadata.shared,
        tensor_memory=tensor_memory,
        programs=programs_that_fit(
            capability, registers, metadata.num_warps, metadata.shared, tensor_memory
        ),
        instructions=kinds(binary.asm["ptx"]),
        half_products=tuple(map(int, _HALF_PRODUCT.findall(binary.asm["ttir"]))),
    )


def kinds(ptx: str) -> Counter[str]:
    """The number of instructions of each kind."""
    patterns = {**MATRIX, **COPIES}
    return Counter({kind: len(re.findall(pattern, ptx)) for kind, pattern in patterns.items()})


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"no match for {pattern!r} in the log of ptxas:\n{log}")
    return int(found[1])


# tt.dot %a, %b, %acc, inputPrecision = tf32 : tensor<64x32xbf16> * tensor<32x64xbf16> -> ...
_HALF_PRODUCT = re.compile(r"= tt\.dot .*? : tensor<(\d+)x\d+xb?f16> \*")


# ------------------------------------------------------------------------------- files of cases


def compile_case(
    run: Callable[[], object], capability: int, cache: Path | None = None
) -> list[Compiled]:
    """Compile the kernels that ``run()`` would launch on ``capability``."""
    with recorded(capability) as launches:
        run()
    if not launches:
        raise ValueError(f"{run} launched no kernel on sm_{capability}")
    return compile_launches(launches, capability, cache)


def case_main(cases: Mapping[str, Callable[[], object]]) -> int:
    """The command line of a file of cases: ``CASE ARCHITECTURES`` prints the records of its
    kernels; ``CASE ARCHITECTURES FOLDER VERSIONS`` writes them to FOLDER/CASE.json."""
    # On its first call, a custom operator imports TorchDynamo to disable tracing, which takes a
    # quarter of this process's start-up. Nothing is traced here.
    stub = SimpleNamespace(disable=lambda function, *args, **options: function)
    torch._dynamo = sys.modules["torch._dynamo"] = stub  # type: ignore[assignment, attr-defined]
    gc.disable()  # saves a tenth of the time and costs a tenth of the memory
    case, capabilities, *rest = sys.argv[1:]
    cache = Path(rest[0]) / "cache" if rest else None
    if cache is not None:
        cache.mkdir(exist_ok=True)
    found: list[dict[str, Any]] = []
    for capability in map(int, capabilities.split(",")):
        records = [
            {**vars(one), "faults": faults(one)}
            for one in compile_case(cases[case], capability, cache)
        ]
        found.append({"case": case, "capability": capability, "kernels": records})
    text = json.dumps(found, indent=1, allow_nan=False)
    if not rest:
        print(text)
        return int(any(record["faults"] for one in found for record in one["kernels"]))
    path = Path(rest[0]) / f"{case}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)
    return 0
