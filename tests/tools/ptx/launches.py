"""Compiles launches on CPU tensors for a GPU, like the launcher, and runs their PTX.

Within ``compiled_for(capability)`` every launch on CPU tensors is specialised and compiled for that
architecture by Triton itself, up to PTX; its parameters and tensor maps are laid out like the
driver's, and the PTX machine executes it on the tensors' memory. Findings of the machine raise
``PtxError``; code that it cannot execute raises ``Unsupported``.

Compiled programs are cached in the cache folder by Triton's own hash.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels import _host
from tests.tools import interpreter
from tests.tools.ptx.machine import Finding, Kernel, cache_folder
from tests.tools.ptx.parser import Unsupported

_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H",
    "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip


class PtxError(AssertionError):
    """A compiled kernel's behaviour would be undefined or nondeterministic on a GPU."""

    def __init__(self, launch: str, findings: list[Finding]) -> None:
        first = {(finding.kind, finding.source): finding for finding in reversed(findings)}
        lines = [
            f"{launch}: {len(findings)} findings, of each kind and line the first",
            *first.values(),
        ]
        super().__init__("\n".join(map(str, lines)))
        self.findings = findings


# ----------------------------------------------------------------------------------- compiling


class _Driver:
    """The part of a driver that the launcher needs when it only compiles."""

    def __init__(self, capability: int, device: str) -> None:
        self._capability, self._device = capability, device

    def get_current_device(self) -> str:
        return self._device  # each device has its own cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)


_launch = JITFunction.run


@contextlib.contextmanager
def compiling_for(capability: int, device: str) -> Iterator[None]:
    """Let the launcher compile for this architecture, up to PTX. ``device``: a name; each has its
    own cache of compiled kernels."""
    outside, make_cubin = driver._active, CUDABackend.make_cubin
    driver.set_active(_Driver(capability, device))
    CUDABackend.make_cubin = lambda *args: b"the PTX is what runs"
    try:
        with knobs.cache.scope():
            knobs.cache.dir = str(cache_folder() / "ptx" / "programs")
            yield
    finally:
        driver._active, CUDABackend.make_cubin = outside, make_cubin


def specialise(kernel: JITFunction, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Triton's compiled kernel for these arguments, specialised by the launcher itself."""
    return _launch(kernel, *args, grid=(1,), warmup=True, **kwargs)


# ---------------------------------------------------------------------------------- parameters


class _TensorMap(ctypes.Structure):
    """The contents of a CUtensorMap; same layout as TensorMap in bulk_copies.cpp."""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("element_bytes", ctypes.c_uint32),
        ("swizzle", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
        ("shape", ctypes.c_uint64 * 5),
        ("stride", ctypes.c_uint64 * 5),
        ("box", ctypes.c_uint32 * 5),
        ("unused_end", ctypes.c_uint32),
    ]


_TENSOR_MAP_MARK = 0x50414D524F534E54
_TENSOR_MAP_BYTES = 128
# Triton's swizzle mode → the wgmma descriptor's mode, width in bytes
_SWIZZLES = {0: (0, 0), 1: (3, 32), 2: (2, 64), 3: (1, 128)}


def _tensor_map(descriptor: TensorDescriptor, meta: Any) -> _TensorMap:
    """Encode a tensor map; rejects what cuTensorMapEncodeTiled rejects."""
    rank, size = len(descriptor.shape), meta["elem_size"]
    swizzle, width = _SWIZZLES[meta["swizzle"]]
    if meta["fp4_padded"] or getattr(descriptor, "padding", "zero") != "zero":
        raise Unsupported("a tensor map of fp4, or one that pads with NaN")
    box = list(reversed(meta["block_size"]))
    strides = [stride * size for stride in reversed(descriptor.strides)]
    allowed = {
        "a base at a multiple of 16 bytes": descriptor.base.data_ptr() % 16 == 0,
        "strides of multiples of 16 bytes": all(stride % 16 == 0 for stride in strides[1:]),
        "neighbouring elements side by side": strides[0] == size,
        "boxes of 1 to 256": all(1 <= n <= 256 for n in box),
        "rows of a box of multiples of 16 bytes": box[0] * size % 16 == 0,
        "rows of a box no wider than its swizzle": not width or box[0] * size <= width,
    }
    for rule, holds in allowed.items():
        if not holds:
            raise AssertionError(f"cuTensorMapEncodeTiled wants {rule}: {descriptor}, box {box}")
    if width and box[0] * size != width:
        raise Unsupported("rows of a box narrower than its swizzle")
    out = _TensorMap(descriptor.base.data_ptr(), rank, size, swizzle)
    out.shape[:rank] = list(reversed(descriptor.shape))
    out.stride[:rank], out.box[:rank] = strides, box
    return out


class Parameters:
    """A launch's parameters in the driver's order and alignment."""

    def __init__(self, binary: Any, arguments: dict[str, Any]) -> None:
        self.data = bytearray()
        self.tensors: list[torch.Tensor] = []
        self._maps: list[_TensorMap] = []  # kept alive: the machine reads them by address
        self._metas = list(getattr(binary.metadata, "tensordesc_meta", None) or [])
        for name, kind in binary.src.signature.items():
            self._add(kind, arguments[name])
        self._pack("QQ", 0, 0)  # scratch memory, which no kernel here uses

    def _pack(self, format: str, *values: Any, align: int = 0) -> None:
        data = struct.pack(format, *values)
        self.data += bytes(-len(self.data) % (align or struct.calcsize(format[0])))
        self.data += data

    def _add(self, kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for inner_kind, inner in zip(kind, value, strict=True):
                self._add(inner_kind, inner)
        elif kind.startswith("*"):
            self.tensors.append(value)
            self._pack("Q", value.data_ptr())
        elif kind.startswith("tensordesc"):
            self._add_descriptor(value)
        elif kind != "constexpr":
            self._pack(_FORMATS[kind], value)

    def _add_descriptor(self, descriptor: TensorDescriptor) -> None:
        self.tensors.append(descriptor.base)
        if not self._metas:  # an architecture without bulk copies: pointer, shape, strides
            raise Unsupported("a tensor descriptor before sm_90")
        self._maps.append(_tensor_map(descriptor, self._metas.pop(0)))
        padding = _TENSOR_MAP_BYTES - 16
        words = _TENSOR_MAP_MARK, ctypes.addressof(self._maps[-1])
        self._pack(f"QQ{padding}x", *words, align=64)
        for size in descriptor.shape:
            self._pack("i", size)
        for stride in descriptor.strides:
            self._pack("q", stride)

    def storages(self) -> list[tuple[int, int]]:
        """(address, size in bytes) of each tensor's memory."""
        storages = [tensor.untyped_storage() for tensor in self.tensors]
        spans = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sorted((start, size) for start, size in spans.items() if size)


# -------------------------------------------------------------------------------------- running


@functools.lru_cache(maxsize=256)  # about 5 MB each
def _kernel(ptx: str, num_warps: int, shared_bytes: int) -> Kernel:
    return Kernel(ptx, num_warps, shared_bytes)


def _prepared(binary: Any, name: str) -> Kernel:
    meta = binary.metadata
    if meta.num_ctas != 1 or getattr(meta, "cluster_dims", (1, 1, 1)) != (1, 1, 1):
        raise Unsupported(f"{name}: clusters")
    if meta.global_scratch_size or getattr(meta, "profile_scratch_size", 0):
        raise Unsupported(f"{name}: scratch memory, which tensor maps made on the device need")
    if getattr(meta, "launch_cooperative_grid", False) or getattr(meta, "launch_pdl", False):
        raise Unsupported(f"{name}: programs that wait for other programs or launches")
    return _kernel(binary.asm["ptx"], meta.num_warps, meta.shared)


@dataclass(frozen=True)
class Prepared:
    """A compiled launch with its parameters."""

    name: str
    kernel: Kernel
    grid: tuple[int, ...]
    parameters: Parameters

    def run(self) -> None:
        """Run the launch; raises ``PtxError``."""
        findings = self.kernel.run(
            self.grid, bytes(self.parameters.data), self.parameters.storages()
        )
        if findings:
            raise PtxError(self.name, findings)


def prepare_launch(
    kernel: JITFunction, args: tuple, kwargs: dict[str, Any], grid: Any, capability: int
) -> Prepared:
    """Compile a launch; raises ``Unsupported``."""
    arguments = interpreter._bind(kernel, args, kwargs)
    try:
        with compiling_for(capability, f"sm_{capability}"):
            binary = specialise(kernel, args, kwargs)
    except RuntimeError as e:
        wide = any(x.dtype == torch.float64 for x in interpreter._tensors(arguments.values()))
        if wide and "PassManager" in str(e):  # float64 products, which are never launched on a GPU
            raise Unsupported(f"{kernel.__name__}: Triton fails to compile it in float64") from e
        raise
    if callable(grid):
        grid = grid(arguments)
    interpreter._programs(tuple(grid))  # rejects invalid grids
    name = f"{kernel.__name__} on sm_{capability}"
    machine_kernel = _prepared(binary, name)
    parameters = Parameters(binary, arguments)
    if len(parameters.data) != machine_kernel.parameter_bytes:
        raise AssertionError(
            f"{name}: {len(parameters.data)} bytes of parameters for a kernel that takes "
            f"{machine_kernel.parameter_bytes}"
        )
    return Prepared(name, machine_kernel, tuple(grid), parameters)


def launch(
    kernel: JITFunction, args: tuple, kwargs: dict[str, Any], grid: Any, capability: int
) -> None:
    prepare_launch(kernel, args, kwargs, grid, capability).run()


@contextlib.contextmanager
def compiled_for(capability: int, run: Any = launch) -> Iterator[None]:
    """Run launches on CPU tensors as PTX for this compute capability, 80 or 90; the kernels' host
    code sees such a GPU with two multiprocessors. ``run`` replaces ``launch``."""
    outside_run = JITFunction.run

    def run_compiled(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup or not interpreter._all_on_cpu((*args, *kwargs.values())):
            return _launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        return run(self, args, kwargs, grid, capability)

    JITFunction.run = run_compiled
    try:
        with _host.interpreted(capability=capability):
            yield
    finally:
        JITFunction.run = outside_run
