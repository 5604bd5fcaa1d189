"""Matrices in 8 bits, and PyTorch's scaled products of them: what ``linear`` and
``linear_cross_entropy`` do with ``fp8=True``.

    x ≈ s * x8        s the least power of two with max |x| / s at most fp8's largest number

Activations and weights are e4m3 (3 bits behind the leading one: |x - s x8| <= 2^-4 |x|, or
s * 2^-10 where that is more), gradients e5m2 (2 bits: 2^-3 |x|, or s * 2^-17). One scale for a
tensor, found on the device at each call: nothing is kept from step to step, nothing waits for the
device. If a tensor holds a NaN or an infinity, all of it is NaN, and so is the loss.

GPUs of compute capability 8.9 and 9.0 multiply 8-bit matrices only where both are contiguous along
the dimension that is summed over. Each is in two of a layer's three products, once along its rows
and once along its columns, so a cast writes both: with 2 bytes an element read twice (once for the
maximum, once for the cast) 6 bytes an element, where the product it feeds saves half its time.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _host, configs
from fastgpt.kernels.costs import KernelCost, nbytes
from fastgpt.kernels.fp8_kernels import _amax_kernel, _quantise_kernel, _transpose_kernel

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_TRITON = {E4M3: tl.float8e4nv, E5M2: tl.float8e5}
_TOP = {E4M3: 8, E5M2: 15}  # the largest numbers are 1.75 * 2^8 and 1.75 * 2^15

# What PyTorch's products want of the dimension that is summed over: 16 bytes. A transpose is
# padded with zeros up to that, which add nothing, so any number of tokens will do.
_ALIGNMENT = 16

_MAX_PARTIALS = 2048


class Quantised(NamedTuple):
    """A matrix (M, N) in fp8, divided by its scale."""

    rows: Tensor | None  # (M, N)
    columns: Tensor | None  # its transpose, padded with zeros: (N, M rounded up to 16)
    scale: Tensor  # (1,) float32
    sums: Tensor | None  # (N,) float32: the columns of the matrix itself, summed


def padded(n_rows: int) -> int:
    return -(-n_rows // _ALIGNMENT) * _ALIGNMENT


def quantise(
    x: Tensor, dtype: torch.dtype, *, rows: bool = True, columns: bool, sums: bool = False
) -> Quantised:
    """x (M, N), contiguous, in ``E4M3`` or ``E5M2``: along its rows, along its columns, or both."""
    n_rows, n_cols = x.shape
    n_padded = padded(n_rows)
    x8 = x.new_empty(x.shape, dtype=dtype) if rows else None
    x8_columns = x.new_empty(n_cols, n_padded, dtype=dtype) if columns else None
    if x.numel() == 0:
        total = x.new_zeros(n_cols, dtype=torch.float32) if sums else None
        return Quantised(x8, x8_columns, x.new_ones(1, dtype=torch.float32), total)
    tile, amax = configs.find(x, "fp8", "quantise"), configs.find(x, "fp8", "amax")
    n_tiles = triton.cdiv(n_padded, tile.BLOCK_M)
    scale = x.new_empty(1, dtype=torch.float32)
    parts = x.new_empty(n_tiles, n_cols, dtype=torch.float32) if sums else None
    n_partials = min(
        triton.cdiv(x.numel(), amax.BLOCK),
        amax.programs * _host.multiprocessors(x.device),
        _MAX_PARTIALS,
    )
    partials = x.new_empty(n_partials, dtype=torch.int32)
    with _host.on_device(x):
        _amax_kernel[(n_partials,)](x, partials, x.numel(), **configs.launch(amax), **_host.FMA)
        _quantise_kernel[(n_tiles, triton.cdiv(n_cols, tile.BLOCK_N))](
            x,
            partials,
            scale,
            x8,
            x8_columns,
            parts,
            n_rows,
            n_cols,
            n_padded,
            n_partials,
            FP8=_TRITON[dtype],
            TOP=_TOP[dtype],
            ROWS=rows,
            COLUMNS=columns,
            SUMS=sums,
            MAX_PARTIALS=triton.next_power_of_2(n_partials),
            **configs.launch(tile),
            **_host.FMA,
        )
    return Quantised(x8, x8_columns, scale, None if parts is None else parts.sum(0))


def transposed(x8: Tensor) -> Tensor:
    """(M, N) in fp8, contiguous → (N, M rounded up to 16), padded with zeros."""
    n_rows, n_cols = x8.shape
    columns = x8.new_empty(n_cols, padded(n_rows))
    tile = configs.find(x8, "fp8", "transpose")
    grid = (
        triton.cdiv(columns.shape[1], tile.BLOCK_M),
        triton.cdiv(n_cols, tile.BLOCK_N),
    )
    with _host.on_device(x8):
        _transpose_kernel[grid](
            x8.view(torch.uint8),
            columns.view(torch.uint8),
            n_rows,
            n_cols,
            columns.shape[1],
            **configs.launch(tile),
            **_host.FMA,
        )
    return columns


def product(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    fast_sums: bool = False,
) -> Tensor:
    """a (M, K) and b (N, K), in fp8 with adjacent columns → ``a bᵀ + bias`` (M, N) of ``dtype``,
    summed in float32 and rounded once.

    With ``fast_sums`` Hopper's tensor cores add up a whole row in their own accumulators, of fewer
    than float32's bits, rather than hand them over every 128 terms: faster, and good enough for
    activations, whose rows are short; gradients are summed over all tokens.
    """
    if 0 in a.shape:
        return a.new_zeros(a.shape[0], b.shape[0], dtype=dtype)
    recipe = F.ScalingType.TensorWise
    with torch.autocast(a.device.type, enabled=False):  # a CPU's product is made of others
        return F.scaled_mm(
            a,
            b.t(),
            a_scale,
            recipe,
            b_scale,
            recipe,
            bias=bias,
            output_dtype=dtype,
            use_fast_accum=fast_sums,
        )


def quantise_cost(name: str, x: Tensor, copies: int) -> list[KernelCost]:
    """Of ``quantise``: x is read for the maximum and for the cast; ``copies``: rows, columns."""
    size = nbytes(x)
    return [
        KernelCost(f"{name} maximum", 0, size),
        KernelCost(f"{name} to fp8", 0, size + copies * x.numel()),
    ]


def product_cost(name: str, m: int, n: int, k: int, out: Tensor) -> KernelCost:
    return KernelCost(name, 2 * m * n * k, m * k + n * k + nbytes(out), fp8=True)
