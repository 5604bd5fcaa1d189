"""Host-side helpers of kernel launches: argument checks, seeds, precision, device properties."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._tensors import autocast_dtype as autocast_dtype
from fastgpt.kernels._tensors import matmul_float32 as matmul_float32

LOG2_E = 1.4426950408889634

# With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
_CPU_CAPABILITY: int | None = None  # replace a GPU's properties for CPU tensors
_CPU_MULTIPROCESSORS = 2

# Passed to every launch: fuse multiplications and additions. This is the default up to Triton 3.8;
# 3.9 warns if it is not given and announces that 3.10 will change the default.
FMA = {"enable_fp_fusion": True}


@contextlib.contextmanager
def interpreted(
    on: bool = True, capability: int | None = None, multiprocessors: int = 2
) -> Iterator[None]:
    """Context in which the ops accept CPU tensors (or reject them, with ``on=False``) and choose
    launches as for a GPU of this compute capability and size; None means the interpreter. The
    caller decides what runs a launch: the interpreter, a recorder, or nothing (fake tensors)."""
    global INTERPRETED, _CPU_CAPABILITY, _CPU_MULTIPROCESSORS
    outside = INTERPRETED, _CPU_CAPABILITY, _CPU_MULTIPROCESSORS
    INTERPRETED, _CPU_CAPABILITY, _CPU_MULTIPROCESSORS = on, capability, multiprocessors
    try:
        yield
    finally:
        INTERPRETED, _CPU_CAPABILITY, _CPU_MULTIPROCESSORS = outside


def cdiv(a: int, b: int) -> int:
    """Ceiling division. ``triton.cdiv``, which kernels use too, costs the host 25 times as much."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def launchable(**tensors: Tensor | None) -> None:
    """Raise an error for tensors that the Triton kernels do not support, naming the argument."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        # float64 is for gradcheck, and only in the interpreter, which needs no tensor cores for it.
        if tensor.dtype not in _DTYPES and not (INTERPRETED and tensor.dtype == torch.float64):
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16 for the Triton kernels, "
                f"got {tensor.dtype}"
            )
        if not tensor.is_cuda and not INTERPRETED:
            raise ValueError(
                f"{name} must be on a CUDA device, got {tensor.device}; on other devices use "
                "fastgpt.ops, or set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter"
            )


def fp8_launchable(x: Tensor, dtype: torch.dtype) -> None:
    """Raise an error if there are no fp8 products for x; ``dtype``: x's dtype after autocast."""
    if not is_half(dtype):
        raise ValueError(
            f"x must be float16 or bfloat16 with fp8=True, or cast to it by autocast, got {dtype}"
        )
    found = capability(x.device)
    if found is not None and found < 89:
        raise ValueError(
            "fp8 must be False on a GPU of compute capability below 8.9 (Ada, Hopper and Blackwell "
            f"have it), got {found // 10}.{found % 10} on {x.device}"
        )


def dropout_seed(device: torch.device) -> Tensor | None:
    """Draw the key of the dropout masks of one step, an int64 tensor (1,), from PyTorch's generator
    for the device."""
    return torch.randint(2**63 - 1, (1,), device=device)


def drawn_seed(seed: Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed of one call: the caller's, or a new one. None without dropout."""
    if dropout_p == 0.0:
        return None
    return dropout_seed(device) if seed is None else seed


def dropout_arguments(dropout_p: float) -> dict[str, Any]:
    """A kernel's arguments: random bits below the threshold drop an element; the rest is scaled."""
    threshold = round(dropout_p * 65536)
    keep_scale = 65536 / (65536 - threshold)
    return dict(threshold=threshold, keep_scale=keep_scale, DROPOUT=threshold > 0)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype of statistics, softmax and sums: float32 (float64 for float64)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """``accumulator`` as a PyTorch dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products follow PyTorch's TF32 setting, like cuBLAS and SDPA. (``allow_tf32`` is its
    older name, which cannot be read once the newer one was set.)"""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


_NOTHING: contextlib.AbstractContextManager = contextlib.nullcontext()


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Make x's device current, since Triton launches on the current device."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(x.device)


@functools.cache
def _properties(index: int) -> tuple[int, int]:
    """Compute capability, as in ``capability``, and the number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def capability(device: torch.device) -> int | None:
    """Compute capability as in the launch tables: 80, 90, 100. On the CPU: None, for the
    interpreter, or what ``interpreted`` sets."""
    if device.type != "cuda":
        return _CPU_CAPABILITY
    return _properties(device.index)[0]


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors. On the CPU: 2, enough to test partial sums."""
    if device.type != "cuda":
        return _CPU_MULTIPROCESSORS
    return _properties(device.index)[1]
