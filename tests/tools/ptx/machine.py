"""Builds the C++ program in machine/ and runs a kernel's PTX in it on the tensors' memory."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.tools.ptx.instructions import translate
from tests.tools.ptx.parser import Unsupported, parse

_SOURCES = Path(__file__).with_name("machine")
# FMA contraction would round once where PTX rounds twice.
_FLAGS = [
    "-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-fno-strict-aliasing",
    "-ffp-contract=off", "-fno-math-errno", "-fPIC",
]  # fmt: skip

# Per program. Far more than the longest one needs: a kernel beyond it is considered hung.
INSTRUCTION_LIMIT = 50_000_000
# Above this total size of the tensors accesses are not recorded; bounds are still checked.
_WATCHED_BYTES = 1 << 27


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastgpt"


@functools.cache
def unavailable() -> str | None:
    """Why the machine cannot run here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the PTX machine runs on x86-64, not on {platform.machine()}"
    if shutil.which("g++") is None:
        return "the PTX machine needs g++"
    return None


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr}")
    return done.stdout


def _key() -> str:
    """Hash of the sources, the compiler, and its meaning of -march=native on this CPU."""
    digest = hashlib.sha256(repr(_FLAGS).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(_run(["g++", "--version"]).encode())
    digest.update(_run(["g++", "-march=native", "-Q", "--help=target"]).encode())
    return digest.hexdigest()[:20]


@functools.cache
def _library() -> ctypes.CDLL:
    built = cache_folder() / "ptx" / f"machine-{_key()}.so"
    built.parent.mkdir(parents=True, exist_ok=True)
    with open(built.parent / "lock", "w") as lock:  # only one process builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            with tempfile.TemporaryDirectory(dir=built.parent) as folder:
                _build(Path(folder), Path(folder) / "machine.so")
                os.replace(Path(folder) / "machine.so", built)
    library = ctypes.CDLL(str(built))
    library.ptx_new.restype = ctypes.c_void_p
    library.ptx_run.restype = ctypes.c_int64
    library.ptx_executed.restype = ctypes.c_uint64
    library.ptx_hits.restype = ctypes.POINTER(ctypes.c_uint64)
    return library


def _build(folder: Path, library: Path) -> None:
    sources = sorted(_SOURCES.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    compilers = [
        subprocess.Popen(
            ["g++", *_FLAGS, "-c", str(source), "-o", str(output)],
            stderr=subprocess.PIPE, text=True,
        )
        for source, output in zip(sources, objects, strict=True)
    ]  # fmt: skip
    errors = [compiler.communicate()[1] for compiler in compilers]
    if any(compiler.returncode for compiler in compilers):
        raise RuntimeError("g++ refuses the PTX machine:\n" + "\n".join(errors))
    _run(["g++", "-shared", "-o", str(library), *map(str, objects)])


@dataclass(frozen=True)
class Finding:
    """Behaviour of a launch that would be undefined or nondeterministic on a GPU."""

    kind: str
    message: str
    times: int
    instruction: str
    line: int  # in the PTX
    source: str  # file:line of the kernel

    def __str__(self) -> str:
        where = f"{self.source}, PTX line {self.line}: {self.instruction}"
        return f"{self.kind}, {self.times} times: {self.message}\n    {where}"


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


class Kernel:
    """A compiled kernel, ready to run. Raises ``Unsupported``."""

    def __init__(self, ptx: str, num_warps: int, shared_bytes: int) -> None:
        self.ptx, self.num_warps, self.shared_bytes = ptx, num_warps, shared_bytes
        self.executed = 0
        self.library = _library()
        program = parse(ptx)
        self.name, self.parameter_bytes = program.name, program.parameter_bytes
        translation = translate(program)
        # For reports: each step's PTX line, source location and text.
        self._places = [
            (row.statement.line, row.statement.source, row.statement.text)
            for row in translation.rows
        ]
        numbers: dict[str, int] = {}
        rows: list[tuple[Any, ...]] = []
        operands: list[int] = []
        for row in translation.rows:
            number = numbers.setdefault(row.operation, len(numbers))
            immediates = (*row.immediates, 0, 0, 0, 0)[:4]
            rows.append(
                (number, len(operands), len(row.operands), row.guard, row.negated, row.target)
                + immediates
            )
            operands += row.operands
        for name in numbers:
            if not self.library.ptx_knows(name.encode()):
                raise Unsupported(f"{program.name}: operation {name}")
        # The machine copies what it needs of these.
        names = (ctypes.c_char_p * len(numbers))(*(name.encode() for name in numbers))
        rows_array = np.array(rows, dtype=np.int64)
        operands_array = np.array(operands or [0], dtype=np.int32)
        registers = np.array(
            [(kind, constant, value) for kind, constant, value in translation.registers],
            dtype=np.uint64,
        )
        counts = (
            len(rows), len(operands), len(registers), num_warps, -(-shared_bytes // 16) * 16,
            translation.shared_granule.bit_length() - 1,
            translation.global_granule.bit_length() - 1,
        )  # fmt: skip
        n_rows, n_operands, n_registers, *rest = map(ctypes.c_int64, counts)
        self._handle = ctypes.c_void_p(
            self.library.ptx_new(
                names, _pointer(rows_array), n_rows, _pointer(operands_array), n_operands,
                _pointer(registers), n_registers, *rest,
            )
        )  # fmt: skip

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.library.ptx_delete(self._handle)

    def run(
        self,
        grid: Sequence[int],
        parameters: bytes,
        storages: Sequence[tuple[int, int]],
        *,
        schedule: int = 0,
        instruction_limit: int = INSTRUCTION_LIMIT,
    ) -> list[Finding]:
        """Run every program of the grid. ``storages``: (address, bytes) of the memory that it may
        access. ``schedule``: 0, or the seed of a random interleaving of the warps."""
        sizes = np.array((*grid, 1, 1)[:3], dtype=np.uint32)
        spans = np.array([*storages, (0, 0)], dtype=np.uint64)
        data = np.frombuffer(parameters or b"\0", dtype=np.uint8)
        watch = sum(size for _, size in storages) <= _WATCHED_BYTES
        n_findings = self.library.ptx_run(
            self._handle, _pointer(data), ctypes.c_int64(len(parameters)), _pointer(spans),
            ctypes.c_int64(len(storages)), _pointer(sizes), ctypes.c_int64(schedule),
            ctypes.c_int64(instruction_limit), ctypes.c_int64(watch),
        )  # fmt: skip
        self.executed = self.library.ptx_executed(self._handle)
        return [self._finding(k) for k in range(n_findings)]

    def executed_lines(self) -> set[int]:
        """PTX lines executed in the last run."""
        hits = self.library.ptx_hits(self._handle)
        return {line for k, (line, _, _) in enumerate(self._places) if hits[k]}

    def _finding(self, k: int) -> Finding:
        buffer = ctypes.create_string_buffer(2048)
        self.library.ptx_report(self._handle, ctypes.c_int64(k), buffer, ctypes.c_int64(2048))
        kind, instruction, times, message = buffer.value.decode().split("\t", 3)
        line, source, text = self._places[min(int(instruction), len(self._places) - 1)]
        return Finding(kind, message, int(times), text[:160], line, source)
