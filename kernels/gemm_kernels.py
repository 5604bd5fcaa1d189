"""Matrix products with an epilogue for ``linear`` and ``mlp``: kernels.

    forward          pre = A Wᵀ + bias,  act = gelu(pre)       A (M, K), W (N, K), pre, act (M, N)
    GELU gradient    dpre = (dY W) * gelu'(pre)                dY (M, K), W (K, N), dpre (M, N)
    weight gradient  dW = dYᵀ X,  dbias = column sums of dY    dY (T, M), X (T, N), dW (M, N)

The first two share a persistent kernel: with n programs, each takes every n-th tile, ordered in
groups of rows so that columns of W are reused while in L2. The third has few tiles and a long sum
over T, so the sum is split and the parts are added up (``partial_sums.py``). The second also writes
column sums of dpre for each row of tiles, which are added up to the gradient of the bias.

``TMA``: the matrices are tensor descriptors, and the tensor memory accelerator copies the tiles.
Otherwise they are pointers, and cp.async copies the tiles.
"""

from typing import Any

import triton
import triton.language as tl

from fastgpt.kernels._device_math import gelu_slope, gelu_value


@triton.jit
def _load(x, stride, row, col, n_rows, n_cols, TMA: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The (R, C) tile at (row, col) of an (n_rows, n_cols) matrix; zeros outside."""
    if TMA:
        tile = x.load([row, col])
    else:
        offs_r, offs_c = row + tl.arange(0, R), col + tl.arange(0, C)
        mask = (offs_r < n_rows)[:, None] & (offs_c < n_cols)[None, :]
        tile = tl.load(
            x + offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :], mask=mask, other=0.0
        )
    return tile


@triton.jit
def _store(
    x, stride, tile, row, col, n_rows, n_cols,
    TMA: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    if TMA:
        x.store([row, col], tile.to(x.dtype))
    else:
        offs_r, offs_c = row + tl.arange(0, R), col + tl.arange(0, C)
        mask = (offs_r < n_rows)[:, None] & (offs_c < n_cols)[None, :]
        ptrs = x + offs_r.to(tl.int64)[:, None] * stride + offs_c[None, :]
        tl.store(ptrs, tile.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _grouped(tile, n_tiles_m, n_tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: down GROUP rows, then on to the next column."""
    per_group = GROUP * n_tiles_n
    first = tile // per_group * GROUP
    size = tl.minimum(n_tiles_m - first, GROUP)
    return first + tile % per_group % size, tile % per_group // size


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """Split an (M, N) block into its left and right halves: an epilogue on one half at a time needs
    half as many registers besides the accumulator."""
    return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))


@triton.jit
def _gelu_epilogue(
    acc, bias_ptr, pre, dpre, act, row, col, n_rows, n_cols,
    TMA: tl.constexpr, GRADIENT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ACT: tl.constexpr,
    TANH: tl.constexpr, FAST: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    if GRADIENT:
        x = _load(pre, n_cols, row, col, n_rows, n_cols, TMA, R, C).to(ACC)
        gradient = acc * gelu_slope(x, TANH, FAST)  # 0 past the last row, where acc is 0
        if HAS_BIAS:
            offs = col + tl.arange(0, C)
            ptrs = bias_ptr + row // R * n_cols + offs
            tl.store(ptrs, tl.sum(gradient, axis=0), mask=offs < n_cols)
        _store(dpre, n_cols, gradient, row, col, n_rows, n_cols, TMA, R, C)
    else:
        # GELU of the saved, rounded value, so that the backward's derivative is at the same point.
        rounded = acc.to(pre.dtype if TMA else pre.dtype.element_ty)
        _store(pre, n_cols, rounded, row, col, n_rows, n_cols, TMA, R, C)
        x = rounded.to(ACC)
    if HAS_ACT:
        value = gelu_value(x, TANH, FAST)
        _store(act, n_cols, value, row, col, n_rows, n_cols, TMA, R, C)


def _linear_gelu_name(specialization: Any) -> str:
    """The kernel's name in profiles and compiled code."""
    direction = "bwd" if specialization.constants["GRADIENT"] else "fwd"
    return f"_linear_gelu_{direction}_kernel"


@triton.jit(repr=_linear_gelu_name)
def _linear_gelu_kernel(
    a,  # (n_rows, n_inner): A, or dY if GRADIENT
    a_stride,
    w,  # (n_cols, n_inner), or (n_inner, n_cols) if GRADIENT
    w_stride,
    bias_ptr,  # if HAS_BIAS: (n_cols); if GRADIENT, written: (rows of tiles, n_cols), sums of dpre
    pre,  # (n_rows, n_cols), contiguous; written, or read if GRADIENT
    dpre,  # (n_rows, n_cols), contiguous, written if GRADIENT
    act,  # (n_rows, n_cols), contiguous, written if HAS_ACT
    n_rows,
    n_cols,
    n_inner,
    GRADIENT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ACT: tl.constexpr,
    TANH: tl.constexpr,
    FAST: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    n_tiles_m, n_tiles_n = tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N)
    for tile in range(tl.program_id(0), n_tiles_m * n_tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _grouped(tile, n_tiles_m, n_tiles_n, GROUP)
        row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
        if HAS_BIAS and not GRADIENT:  # added before the products, not in the epilogue
            offs = col + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + offs, mask=offs < n_cols, other=0.0).to(ACC)[None, :]
        for k in range(0, n_inner, BLOCK_K):
            x = _load(a, a_stride, row, k, n_rows, n_inner, TMA, BLOCK_M, BLOCK_K)
            if GRADIENT:
                y = _load(w, w_stride, k, col, n_inner, n_cols, TMA, BLOCK_K, BLOCK_N)
            else:
                y = _load(w, w_stride, col, k, n_cols, n_inner, TMA, BLOCK_N, BLOCK_K).T
            acc = tl.dot(x, y, acc, input_precision=PRECISION, out_dtype=ACC)
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        _gelu_epilogue(
            left, bias_ptr, pre, dpre, act, row, col, n_rows, n_cols,
            TMA, GRADIENT, HAS_BIAS, HAS_ACT, TANH, FAST, ACC, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _gelu_epilogue(
            right, bias_ptr, pre, dpre, act, row, col + BLOCK_N // 2, n_rows, n_cols,
            TMA, GRADIENT, HAS_BIAS, HAS_ACT, TANH, FAST, ACC, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit
def _weight_sum(
    dy, dy_stride, x, x_stride, row, col, start, stop, n_tokens, n_rows, n_cols,
    TMA: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dYᵀ X over the tokens from start to stop and, if BIAS, of the column sums of dY."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    EQUAL: tl.constexpr = 16 if TMA else 1  # number of columns, which all hold the same sum
    acc_bias = tl.zeros([BLOCK_M, EQUAL], dtype=ACC)
    for k in range(start, stop, BLOCK_K):
        a = _load(dy, dy_stride, k, row, n_tokens, n_rows, TMA, BLOCK_K, BLOCK_M)
        b = _load(x, x_stride, k, col, n_tokens, n_cols, TMA, BLOCK_K, BLOCK_N)
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if BIAS:
            if TMA:  # tl.sum over registers would make ptxas serialise every wgmma
                ones = tl.full([BLOCK_K, EQUAL], 1.0, dtype=a.dtype)
                acc_bias = tl.dot(a.T, ones, acc_bias, input_precision=PRECISION, out_dtype=ACC)
            else:
                acc_bias += tl.sum(a.to(ACC), axis=0)[:, None]
    return acc, tl.sum(acc_bias, axis=1) / EQUAL


@triton.jit
def _weight_grad_kernel(
    dy,  # (n_tokens, n_rows)
    dy_stride,
    x,  # (n_tokens, n_cols)
    x_stride,
    dweight_ptr,  # (n_splits, n_rows, n_cols): partial sums, or the result if n_splits is 1
    dbias_ptr,  # (n_splits, n_rows), likewise; written if HAS_BIAS
    n_tokens,
    n_rows,
    n_cols,
    tokens_per_split,  # a multiple of BLOCK_K
    TMA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile_m, tile_n = _grouped(
        tl.program_id(0), tl.cdiv(n_rows, BLOCK_M), tl.cdiv(n_cols, BLOCK_N), GROUP
    )
    row, col = tile_m * BLOCK_M, tile_n * BLOCK_N
    split = tl.program_id(1).to(tl.int64)
    start = tl.program_id(1) * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, n_tokens)
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    # Only the first column of tiles sums the bias; the branch is outside the loop.
    if HAS_BIAS and tile_n == 0:
        acc, acc_bias = _weight_sum(
            dy, dy_stride, x, x_stride, row, col, start, stop, n_tokens, n_rows, n_cols,
            TMA, True, PRECISION, ACC, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        tl.store(dbias_ptr + split * n_rows + offs_m, acc_bias, mask=offs_m < n_rows)
    else:
        acc, acc_bias = _weight_sum(
            dy, dy_stride, x, x_stride, row, col, start, stop, n_tokens, n_rows, n_cols,
            TMA, False, PRECISION, ACC, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    ptrs = dweight_ptr + (split * n_rows + offs_m[:, None]) * n_cols + offs_n[None, :]
    mask = (offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :]
    tl.store(ptrs, acc, mask=mask)
