"""What the kernels share: jit math, Philox dropout, precision, and what a launch depends on."""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._precision import autocast_dtype as autocast_dtype
from fastgpt.kernels._precision import matmul_float32 as matmul_float32

LOG2_E = 1.4426950408889634

# With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# For every launch: a product and a sum in one instruction. Up to 3.8 Triton does so by itself; 3.9
# warns where it was not asked for, and says that 3.10 will not.
FMA = {"enable_fp_fusion": True}

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------- jit helpers


@triton.jit
def rounded_quotient(x, y):
    """x / y of blocks or scalars of one float dtype. In float32 ``/`` is a product with an
    approximate reciprocal, for which x / x may differ from 1; adding what is left of x, which an
    FMA has exactly, leaves one rounding. For finite numbers and quotients: others become NaN.
    ``tl.div_rn`` takes more registers, since it is a subroutine."""
    quotient = x / y
    return quotient + tl.fma(-quotient, y, x) / y


@triton.jit
def _exp_half_square(x):
    """exp(-x² / 2). tl.exp2 is one instruction, tl.exp also cares for results below 2^-126."""
    return tl.exp2(-0.7213475204444817 * x * x)


@triton.jit
def _normal_cdf(x, exp_half_square, FAST: tl.constexpr):
    """Phi(x). FAST is Abramowitz & Stegun 7.1.26 at less than half of erf's instructions: half
    precision does not see the difference, a GEMM's epilogue does. Its quotient is the square of a
    reciprocal root, one instruction where a division is five. Error below 3e-7, and below 1e-6
    with a root that is as wrong as the GPU's may be, by 2^-22.4 of it."""
    if FAST:
        root = tl.rsqrt(1.0 + 0.2316418882663604 * tl.abs(x))
        t = root * root
        p = -0.7265760135 + t * 0.5307027145
        p = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * p))
        upper_tail = t * p * exp_half_square
        cdf = tl.where(x > 0.0, 1.0 - upper_tail, upper_tail)
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf


@triton.jit
def _tanh_weight(x, FAST: tl.constexpr):
    """What the tanh form multiplies x with: (1 + tanh(u)) / 2 is sigmoid(2u)."""
    twice_u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    if FAST:
        root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * twice_u))
        weight = root * root
    else:
        weight = tl.sigmoid(twice_u)
    return weight


@triton.jit
def gelu_value(x, TANH: tl.constexpr, FAST: tl.constexpr):
    """GELU of a block in accumulator precision."""
    if TANH:
        y = x * _tanh_weight(x, FAST)
    else:
        y = x * _normal_cdf(x, _exp_half_square(x), FAST)
    return y


@triton.jit
def gelu_slope(x, TANH: tl.constexpr, FAST: tl.constexpr):
    """The derivative of ``gelu_value``."""
    if TANH:
        s = _tanh_weight(x, FAST)
        slope = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        exp_half_square = _exp_half_square(x)
        slope = _normal_cdf(x, exp_half_square, FAST) + x * 0.3989422804014327 * exp_half_square
    return slope


@triton.jit
def dropout_keep(
    seed,
    stream,
    plane,
    start_col,
    offs_row,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(BLOCK_M, BLOCK_N) bool: which elements of a tile of matrix ``plane`` are kept.

    One Philox 4x32-10 block (Salmon et al. 2011) gives eight neighbouring columns 16 bits each;
    ``reference.dropout_mask`` says which. The bits depend on seed, stream and position alone, never
    on the tile sizes, so forward and backward agree whatever their tiles.
    """
    c0 = (start_col // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
    c0, c1 = tl.broadcast(c0, offs_row[:, None])
    c2, c3 = tl.zeros_like(c0) + plane, tl.zeros_like(c0) + stream
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    k0 = tl.join((w0 & 0xFFFF) >= threshold, (w0 >> 16) >= threshold)
    k1 = tl.join((w1 & 0xFFFF) >= threshold, (w1 >> 16) >= threshold)
    k2 = tl.join((w2 & 0xFFFF) >= threshold, (w2 >> 16) >= threshold)
    k3 = tl.join((w3 & 0xFFFF) >= threshold, (w3 >> 16) >= threshold)
    # The last three dimensions are (half, high bit of the word, low bit of the word).
    keep = tl.join(tl.join(k0, k2), tl.join(k1, k3))
    return tl.reshape(keep, [BLOCK_M, BLOCK_N])


# --------------------------------------------------------------------------------- host helpers


def launchable(**tensors: Tensor | None) -> None:
    """Refuse what the Triton kernels cannot run on, naming the argument."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        # float64 exists for gradcheck, and only where no tensor core has to support it.
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
    """Refuse what has no fp8 products; ``dtype``: of x, once autocast has cast it."""
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
    """An int64 tensor (1,) on the device: the key of the dropout masks of one step, drawn from
    PyTorch's generator for the device."""
    return torch.randint(2**63 - 1, (1,), device=device)


def drawn_seed(seed: Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed of one call: the caller's, or one from PyTorch's generator for the device."""
    if dropout_p == 0.0:
        return None
    return dropout_seed(device) if seed is None else seed


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """What a kernel is told: bits below the threshold are dropped, the rest is scaled."""
    threshold = round(dropout_p * 65536)
    return threshold, 65536 / (65536 - threshold)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Statistics, softmax and sums are kept in float32 (float64 for float64)."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products follow PyTorch's own switch, as cuBLAS and SDPA do. (``allow_tf32`` is its
    older spelling, which cannot be read once the newer one was set.)"""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


def capability(device: torch.device) -> int | None:
    """Compute capability as in the launch tables: 80, 90, 100; None when interpreted."""
    if device.type != "cuda":
        return None
    properties = _properties(device.index)
    return 10 * properties.major + properties.minor


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; 2 when interpreted, enough to test partial sums."""
    return 2 if device.type != "cuda" else _properties(device.index).multi_processor_count
