"""8-bit matrices and PyTorch's scaled products of them, for ``linear_cross_entropy`` with
``fp8=True``.

    x ≈ s * x8     s: the smallest power of two with max |x| / s at most 448, e4m3's largest number

Activations and weights are e4m3 (3 mantissa bits: |x - s x8| <= 2^-4 |x|, or s * 2^-10 if that is
larger). Each tensor has one scale, computed on the device at every call: no state is kept between
steps, and the host never waits. If a tensor holds a NaN or an infinity, all of it becomes NaN, and
so does the loss. Because the scale is a power of two, dividing by it is exact: the only error is
fp8's own rounding, and at most one bit of range is lost.

GPUs of compute capability 8.9 and 9.0 require both 8-bit operands to be contiguous along the
dimension that is summed over. x and weight each occur in two products, once along their rows and
once along their columns. The columns are transposed from the quantised rows. Writing them in the
cast would save 2 bytes per element, but there ptxas 12.8 stored some bytes of the packed numbers
before it had unpacked them (every fourth column was zeros, on an H200).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _host, configs

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@triton.jit
def _amax_kernel(
    x_ptr,  # (n), contiguous
    partials_ptr,  # (programs) int32: the bits of the largest magnitude that each program read
    n,
    BLOCK: tl.constexpr,
):
    # As integers, the bits of magnitudes are ordered like the magnitudes, infinity and NaN on top.
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        offs = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(partials_ptr + tl.program_id(0), tl.max(bits, axis=0))


@triton.jit
def _scale_of(bits):
    """The smallest power of two that, as a divisor, brings the magnitude into e4m3's range, whose
    largest number is 1.75 * 2^8, and its inverse. NaN for infinity and NaN."""
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - 8, 1)  # rounded up past a mantissa of 1.75
    finite = bits < 0x7F800000
    scale = tl.where(finite, exponent << 23, 0x7FC00000)
    inverse = tl.where(finite, (254 - exponent) << 23, 0x7FC00000)
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def _quantise_kernel(
    x_ptr,  # (n_rows, n_cols), contiguous
    partials_ptr,  # (n_partials), of _amax_kernel
    scale_ptr,  # (1)
    rows_ptr,  # (n_rows, n_cols) e4m3
    n_rows,
    n_cols,
    n_partials,
    MAX_PARTIALS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs = tl.arange(0, MAX_PARTIALS)
    partials = tl.load(partials_ptr + offs, mask=offs < n_partials, other=0)
    scale, inverse = _scale_of(tl.max(partials, axis=0))
    if tl.program_id(0) == 0 and tl.program_id(1) == 0:
        tl.store(scale_ptr, scale)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = offs_m.to(tl.int64)[:, None] * n_cols + offs_n[None, :]
    mask = (offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0).to(tl.float32)
    tl.store(rows_ptr + offs, (x * inverse).to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _transpose_kernel(
    x_ptr,  # (n_rows, n_cols) bytes, contiguous
    columns_ptr,  # (n_cols, padded_rows), with zeros in the padding
    n_rows,
    n_cols,
    padded_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * n_cols + offs_n[None, :]
    x = tl.load(ptrs, mask=(offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :], other=0)
    ptrs = columns_ptr + offs_n.to(tl.int64)[None, :] * padded_rows + offs_m[:, None]
    tl.store(ptrs, x, mask=(offs_m < padded_rows)[:, None] & (offs_n < n_cols)[None, :])


# PyTorch's products require the dimension that is summed over to be a multiple of 16 bytes.
# Transposes are padded with zeros, so that any number of tokens works.
_ALIGNMENT = 16

_MAX_PARTIALS = 2048


class Quantised(NamedTuple):
    """A matrix (M, N) in e4m3, divided by its scale."""

    rows: Tensor  # (M, N)
    columns: Tensor | None  # its transpose, padded with zeros: (N, M rounded up to 16)
    scale: Tensor  # (1,) float32


def quantise(x: Tensor, *, columns: bool) -> Quantised:
    """Quantise x (M, N), contiguous, to e4m3: its rows and, with ``columns``, its transpose."""
    n_rows, n_cols = x.shape
    x8 = x.new_empty(x.shape, dtype=E4M3)
    if x.numel() == 0:
        empty = x8.new_empty(n_cols, 0) if columns else None
        return Quantised(x8, empty, x.new_ones(1, dtype=torch.float32))
    tile, amax = configs.find(x, "fp8", "quantise"), configs.find(x, "fp8", "amax")
    scale = x.new_empty(1, dtype=torch.float32)
    n_partials = min(
        _host.cdiv(x.numel(), amax.BLOCK),
        amax.programs * _host.multiprocessors(x.device),
        _MAX_PARTIALS,
    )
    partials = x.new_empty(n_partials, dtype=torch.int32)
    with _host.on_device(x):
        _amax_kernel[(n_partials,)](x, partials, x.numel(), **configs.launch(amax))
        _quantise_kernel[_host.cdiv(n_rows, tile.BLOCK_M), _host.cdiv(n_cols, tile.BLOCK_N)](
            x,
            partials,
            scale,
            x8,
            n_rows,
            n_cols,
            n_partials,
            MAX_PARTIALS=_host.next_power_of_2(n_partials),
            **configs.launch(tile),
        )
    return Quantised(x8, transposed(x8) if columns else None, scale)


def transposed(x8: Tensor) -> Tensor:
    """(M, N) in fp8, contiguous → (N, M rounded up to 16), padded with zeros."""
    n_rows, n_cols = x8.shape
    padded_rows = _host.cdiv(n_rows, _ALIGNMENT) * _ALIGNMENT
    columns = x8.new_empty(n_cols, padded_rows)
    tile = configs.find(x8, "fp8", "transpose")
    grid = _host.cdiv(padded_rows, tile.BLOCK_M), _host.cdiv(n_cols, tile.BLOCK_N)
    with _host.on_device(x8):
        _transpose_kernel[grid](
            x8.view(torch.uint8),
            columns.view(torch.uint8),
            n_rows,
            n_cols,
            padded_rows,
            **configs.launch(tile),
        )
    return columns


def product(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    *,
    fast_sums: bool = False,
) -> Tensor:
    """a (M, K) and b (N, K), in fp8 with adjacent columns → ``a bᵀ`` (M, N) of ``dtype``, summed in
    float32 and rounded once.

    With ``fast_sums``, Hopper's tensor cores sum whole rows in their own accumulators, which have
    fewer bits than float32, instead of moving them to float32 every 128 terms. This is faster and
    accurate enough for activations, whose rows are short, but not for sums over all tokens.
    """
    if 0 in a.shape:
        return a.new_zeros(a.shape[0], b.shape[0], dtype=dtype)
    recipe = F.ScalingType.TensorWise
    with torch.autocast(a.device.type, enabled=False):  # the CPU's is composed of other ops
        return F.scaled_mm(
            a,
            b.t(),
            a_scale,
            recipe,
            b_scale,
            recipe,
            output_dtype=dtype,
            use_fast_accum=fast_sums,
        )
