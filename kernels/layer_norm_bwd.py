"""LayerNorm's backward kernels and their launcher. See ``layer_norm.py`` for the equations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _host, configs
from fastgpt.kernels.layer_norm_fwd import (
    NOT_SPECIALISED,
    as_rows,
    contiguous_or_none,
    dropped,
    tile_ptrs,
    whole_rows,
)
from fastgpt.kernels.partial_sums import sum_row_blocks

# A backward tile also accumulates the parameter gradients. Beyond MAX_FUSED_WIDTH columns they no
# longer fit in registers next to a whole row: a separate kernel computes the row means, and the
# tiles are narrow.
MAX_FUSED_WIDTH = 4096


@triton.jit
def _load_tile(
    dy_ptr, x_ptr, x_stride_row, mean_ptr, rstd_ptr, start, offs_m, offs_n, n_rows, n_cols,
    ACC: tl.constexpr,
):  # fmt: skip
    """dy, x̂ and rstd of a tile. Outside the matrix dy is 0, so padding does not change the sums."""
    mask_m = start + offs_m < n_rows
    mask = mask_m[:, None] & (offs_n < n_cols)[None, :]
    x_ptrs = tile_ptrs(x_ptr, x_stride_row, start, offs_m, offs_n)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    dy_ptrs = tile_ptrs(dy_ptr, n_cols, start, offs_m, offs_n)
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACC)
    mean = tl.load(mean_ptr + start + offs_m, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + start + offs_m, mask=mask_m, other=0.0)
    return dy, (x - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def _store_partial(partial_ptr, parameter, acc, offs_n, n_cols):
    """Store one parameter's gradient, summed over the rows of this program's block."""
    row = (parameter * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    tl.store(partial_ptr + row * n_cols + offs_n, tl.sum(acc, axis=0), mask=offs_n < n_cols)


@triton.jit
def _row_means(w, x_hat, n_cols):
    return tl.sum(w, axis=1) / n_cols, tl.sum(w * x_hat, axis=1) / n_cols


@triton.jit(do_not_specialize=NOT_SPECIALISED)
def _layer_norm_bwd_means_kernel(
    dy_ptr,  # (n_rows, n_cols), contiguous
    x_ptr,  # (n_rows, n_cols), columns adjacent: x, or total
    x_stride_row,
    weight_ptr,  # (n_cols)
    mean_ptr,  # (n_rows)
    rstd_ptr,  # (n_rows)
    means_ptr,  # (2, n_rows): the means of w and of w * x̂
    n_rows,
    n_cols,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the row means for ``_layer_norm_bwd_kernel`` if a row is too wide for its tile."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dy, x_hat, _ = _load_tile(
        dy_ptr, x_ptr, x_stride_row, mean_ptr, rstd_ptr, start, offs_m, offs_n, n_rows, n_cols, ACC
    )
    weight = tl.load(weight_ptr + offs_n, mask=offs_n < n_cols, other=0.0).to(ACC)
    mean_w, mean_wx = _row_means(weight[None, :] * dy, x_hat, n_cols)
    mask_m = start + offs_m < n_rows
    tl.store(means_ptr + start + offs_m, mean_w, mask=mask_m)
    tl.store(means_ptr + n_rows + start + offs_m, mean_wx, mask=mask_m)


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=["seed_ptr"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # (n_rows, n_cols), contiguous
    dtotal_ptr,  # (n_rows, n_cols), contiguous, or None: zero
    x_ptr,  # (n_rows, n_cols), columns adjacent: x, or total
    x_stride_row,
    weight_ptr,  # (n_cols)
    mean_ptr,  # (n_rows)
    rstd_ptr,  # (n_rows)
    means_ptr,  # (2, n_rows), or None: the tile spans the row and computes them
    dx_ptr,  # (n_rows, n_cols), contiguous: dx, or dresidual
    ddelta_ptr,  # (n_rows, n_cols), contiguous, or None if it equals dx or there is no delta
    partial_ptr,  # (1 to 3, programs, n_cols): dweight, dbias, ddelta_bias
    seed_ptr,  # (1), read only if DROPOUT
    dropout_offset,
    n_rows,
    n_cols,
    rows_per_program,  # a multiple of BLOCK_M
    threshold,
    keep_scale,
    HAS_BIAS: tl.constexpr,
    HAS_DELTA_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr = 1,
):
    start_n = tl.program_id(1) * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_cols
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    acc_dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_ddelta_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)

    first = tl.program_id(0).to(tl.int64) * rows_per_program
    stop = tl.minimum(first + rows_per_program, n_rows)
    for start in tl.range(first, stop, BLOCK_M, num_stages=STAGES):
        mask_m = start + offs_m < n_rows
        mask = mask_m[:, None] & mask_n[None, :]
        dy, x_hat, rstd = _load_tile(
            dy_ptr, x_ptr, x_stride_row, mean_ptr, rstd_ptr, start, offs_m, offs_n, n_rows, n_cols,
            ACC,
        )  # fmt: skip
        w = weight[None, :] * dy
        if means_ptr is None:
            mean_w, mean_wx = _row_means(w, x_hat, n_cols)
        else:
            mean_w = tl.load(means_ptr + start + offs_m, mask=mask_m, other=0.0)
            mean_wx = tl.load(means_ptr + n_rows + start + offs_m, mask=mask_m, other=0.0)
        dx = (w - mean_w[:, None] - x_hat * mean_wx[:, None]) * rstd[:, None]
        if dtotal_ptr is not None:
            dtotal_ptrs = tile_ptrs(dtotal_ptr, n_cols, start, offs_m, offs_n)
            dx += tl.load(dtotal_ptrs, mask=mask, other=0.0).to(ACC)
        dx_ptrs = tile_ptrs(dx_ptr, n_cols, start, offs_m, offs_n)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        ddelta = dx
        if DROPOUT:
            ddelta = dropped(
                dx,
                seed_ptr,
                dropout_offset,
                start,
                start_n,
                threshold,
                keep_scale,
                BLOCK_M,
                BLOCK_N,
            )
        if ddelta_ptr is not None:
            ddelta_ptrs = tile_ptrs(ddelta_ptr, n_cols, start, offs_m, offs_n)
            tl.store(ddelta_ptrs, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)
        acc_dweight += dy * x_hat
        if HAS_BIAS:
            acc_dbias += dy
        if HAS_DELTA_BIAS:
            acc_ddelta_bias += ddelta

    _store_partial(partial_ptr, 0, acc_dweight, offs_n, n_cols)
    if HAS_BIAS:
        _store_partial(partial_ptr, 1, acc_dbias, offs_n, n_cols)
    if HAS_DELTA_BIAS:
        _store_partial(partial_ptr, 2 if HAS_BIAS else 1, acc_ddelta_bias, offs_n, n_cols)


def empty_gradients(
    x: Tensor,
    weight: Tensor,
    ddelta_dtype: torch.dtype | None,
    has_bias: bool,
    has_delta_bias: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Allocate dx, ddelta if ``ddelta_dtype`` is given, and 1 to 3 parameter gradients."""
    dtypes = [x.dtype] if ddelta_dtype is None else [x.dtype, ddelta_dtype]
    return (
        [x.new_empty(x.shape, dtype=dtype) for dtype in dtypes],
        [weight.new_empty(weight.shape) for _ in range(1 + has_bias + has_delta_bias)],
    )


def layer_norm_bwd(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    dropout_offset: int,
    ddelta_dtype: torch.dtype | None,
    has_bias: bool,
    has_delta_bias: bool,
) -> list[Tensor]:
    """dx (or dresidual); ddelta if ``ddelta_dtype`` is given, otherwise it equals dx; dweight;
    dbias and ddelta_bias if those biases exist. ``x``: the plain op's x, or total."""
    rows, dy, dtotal = as_rows(x), dy.contiguous(), contiguous_or_none(dtotal)
    n_rows, n_cols = rows.shape
    activations, params = empty_gradients(x, weight, ddelta_dtype, has_bias, has_delta_bias)
    dx, ddelta = (*activations, None)[:2]
    if n_rows == 0:
        return activations + [p.zero_() for p in params]

    row_launch, resident = whole_rows(x, "bwd")
    if dropout_p or resident is None:  # what registers allow at 768 columns in bfloat16
        resident = 3 if dropout_p else 4
    fused = n_cols <= MAX_FUSED_WIDTH
    launch = row_launch
    if not fused:
        launch = configs.launch(configs.find(x, "layer_norm", "bwd_narrow"))
    tiles = _host.cdiv(n_rows, launch["BLOCK_M"])
    programs = min(resident * _host.multiprocessors(x.device), tiles)
    rows_per_program = _host.cdiv(tiles, programs) * launch["BLOCK_M"]
    programs = _host.cdiv(n_rows, rows_per_program)
    partial = torch.empty(len(params), programs, n_cols, dtype=mean.dtype, device=x.device)
    acc = _host.accumulator(x.dtype)
    inputs = rows, rows.stride(0), weight.contiguous(), mean, rstd
    means = None if fused else torch.empty(2, n_rows, dtype=mean.dtype, device=x.device)
    with _host.on_device(x):
        if not fused:
            _layer_norm_bwd_means_kernel[(_host.cdiv(n_rows, row_launch["BLOCK_M"]),)](
                dy, *inputs, means, n_rows, n_cols, ACC=acc, **row_launch
            )
        _layer_norm_bwd_kernel[(programs, _host.cdiv(n_cols, launch["BLOCK_N"]))](
            dy,
            dtotal,
            *inputs,
            means,
            dx,
            ddelta,
            partial,
            seed,
            dropout_offset,
            n_rows,
            n_cols,
            rows_per_program,
            **_host.dropout_arguments(dropout_p),
            HAS_BIAS=has_bias,
            HAS_DELTA_BIAS=has_delta_bias,
            ACC=acc,
            **launch,
        )
    sum_row_blocks(partial, params, configs.find(x, "layer_norm", "sum_row_blocks"))
    return activations + params
