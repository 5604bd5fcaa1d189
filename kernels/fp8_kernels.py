"""The Triton kernels of the fp8 mode: the largest magnitude, the scaled cast, the transpose.

A scale is a power of two, so that dividing by it rounds nothing: what is lost is fp8's rounding
alone, which is the same wherever it is computed. It costs at most one bit of range below, none of
precision. The magnitudes of floats are ordered as their bits are ordered as integers, with infinity
and NaN on top, so a maximum of the bits hides no NaN.
"""

import triton
import triton.language as tl


@triton.jit
def _amax_kernel(
    x_ptr,  # (n), contiguous
    partials_ptr,  # (programs) int32: the largest magnitude that a program met, as bits
    n,
    BLOCK: tl.constexpr,
):
    bits = tl.zeros([BLOCK], dtype=tl.int32)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        offs = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        bits = tl.maximum(bits, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(partials_ptr + tl.program_id(0), tl.max(bits, axis=0))


@triton.jit
def _scale_of(bits, TOP: tl.constexpr):
    """The least power of two that divides the magnitude into fp8's range, whose largest number is
    1.75 * 2^TOP, and its inverse; NaN for infinity and NaN."""
    exponent = tl.maximum(((bits + 0x1FFFFF) >> 23) - TOP, 1)  # 1 from 1.75 on counts as 2
    finite = bits < 0x7F800000
    scale = tl.where(finite, exponent << 23, 0x7FC00000)
    inverse = tl.where(finite, (254 - exponent) << 23, 0x7FC00000)
    return scale.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit
def _store_columns(columns_ptr, tile, offs_m, offs_n, padded_rows, n_cols):
    """The tile's transpose: (n_cols, padded_rows), contiguous."""
    ptrs = columns_ptr + offs_n.to(tl.int64)[None, :] * padded_rows + offs_m[:, None]
    tl.store(ptrs, tile, mask=(offs_m < padded_rows)[:, None] & (offs_n < n_cols)[None, :])


@triton.jit
def _load_rows(x_ptr, offs_m, offs_n, n_rows, n_cols):
    ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * n_cols + offs_n[None, :]
    return tl.load(ptrs, mask=(offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :], other=0)


@triton.jit
def _quantise_kernel(
    x_ptr,  # (n_rows, n_cols), contiguous
    partials_ptr,  # (n_partials), of _amax_kernel
    scale_ptr,  # (1)
    rows_ptr,  # (n_rows, n_cols) fp8, written if ROWS
    columns_ptr,  # (n_cols, padded_rows) fp8, written if COLUMNS, with zeros in the padding
    sums_ptr,  # (tiles of rows, n_cols): sums of x over the rows of a tile, written if SUMS
    n_rows,
    n_cols,
    padded_rows,
    n_partials,
    FP8: tl.constexpr,
    TOP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMS: tl.constexpr,
    MAX_PARTIALS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs = tl.arange(0, MAX_PARTIALS)
    partials = tl.load(partials_ptr + offs, mask=offs < n_partials, other=0)
    scale, inverse = _scale_of(tl.max(partials, axis=0), TOP)
    if tl.program_id(0) == 0 and tl.program_id(1) == 0:
        tl.store(scale_ptr, scale)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = _load_rows(x_ptr, offs_m, offs_n, n_rows, n_cols).to(tl.float32)
    tile = (x * inverse).to(FP8)
    if ROWS:
        ptrs = rows_ptr + offs_m.to(tl.int64)[:, None] * n_cols + offs_n[None, :]
        tl.store(ptrs, tile, mask=(offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :])
    if COLUMNS:
        _store_columns(columns_ptr, tile, offs_m, offs_n, padded_rows, n_cols)
    if SUMS:
        ptrs = sums_ptr + tl.program_id(0).to(tl.int64) * n_cols + offs_n
        tl.store(ptrs, tl.sum(x, axis=0), mask=offs_n < n_cols)


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
    tile = _load_rows(x_ptr, offs_m, offs_n, n_rows, n_cols)
    _store_columns(columns_ptr, tile, offs_m, offs_n, padded_rows, n_cols)
