"""LayerNorm (Ba et al. 2016) over the last dimension, forward and backward; on request of a
residual sum, which is formed on the way. The kernels of ``layer_norm`` and ``residual_layer_norm``.

    total = residual + dropout(delta + delta_bias)                 (or the plain op's x)
    y = (total - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps)

All are (M, N) after flattening; weight, bias and delta_bias (N). The statistics are those of total
as it is stored, rounded. Saved for backward: total (or x), weight and, in float32, mean and rstd
(M each); never delta, and no mask: it is drawn again. With x̂ = (total - mean) * rstd and
w = weight * dy, per row:

    dresidual = dtotal + rstd * (w - sum(w) / N - x̂ * sum(w * x̂) / N)
    ddelta = dropout's backward of dresidual         ddelta_bias = sum over rows of ddelta
    dweight = sum over rows of dy * x̂                dbias = sum over rows of dy

Bytes moved, s an element: plain 2s forward (x in, y out) and 3s backward (x, dy in, dx out); with a
residual 4s forward (residual, delta in, y, total out) and 4s backward (total, dy, dtotal in,
dresidual out), s more for ddelta where it differs from dresidual: with dropout, or in another
dtype. About 10 and 16 FLOPs an element, so memory bounds all. The parameters' gradients are summed
in float32 by one program per band of rows, then over the bands in a fixed order: no atomics, so
two runs give the same bits.
"""

import triton
import triton.language as tl

from fastgpt.kernels._device_math import dropout_keep, rounded_quotient

# Numbers whose being 1 or divisible by 16 would gain nothing but further compilations.
NOT_SPECIALISED = ["n_rows", "rows_per_program", "stream", "threshold"]


@triton.jit
def _tile_ptrs(ptr, stride_row, start, offs_m, offs_n):
    """Pointers to a tile whose first row is ``start``: that alone needs 64 bits, and registers
    for addresses are what narrow tiles run out of."""
    return (
        ptr
        + tl.cast(start, tl.int64) * stride_row
        + (offs_m[:, None] * stride_row + offs_n[None, :])
    )


@triton.jit
def _dropped(
    x, seed_ptr, stream, start, start_col, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dropout of a tile whose first element is (start, start_col)."""
    rows = (start + tl.arange(0, BLOCK_M)).to(tl.int32)
    seed = tl.load(seed_ptr)
    keep = dropout_keep(seed, stream, 0, start_col, rows, threshold, BLOCK_M, BLOCK_N)
    return tl.where(keep, x * keep_scale, 0.0)


# -------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=["seed_ptr"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (n_rows, n_cols), columns adjacent: the plain op's x, or the residual
    x_stride_row,
    delta_ptr,  # (n_rows, n_cols), columns adjacent; None in the plain op, and so are...
    delta_stride_row,
    delta_bias_ptr,  # (n_cols), or None
    total_ptr,  # (n_rows, n_cols), contiguous: ... this one
    weight_ptr,  # (n_cols)
    bias_ptr,  # (n_cols), or None
    y_ptr,  # (n_rows, n_cols), contiguous
    mean_ptr,  # (n_rows)
    rstd_ptr,  # (n_rows)
    seed_ptr,  # (1), read only if DROPOUT
    stream,
    n_rows,
    n_cols,
    eps,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask_m, mask_n = start + offs_m < n_rows, offs_n < n_cols
    mask = mask_m[:, None] & mask_n[None, :]

    x_ptrs = _tile_ptrs(x_ptr, x_stride_row, start, offs_m, offs_n)
    if delta_ptr is None:
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    else:
        delta_ptrs = _tile_ptrs(delta_ptr, delta_stride_row, start, offs_m, offs_n)
        delta = tl.load(delta_ptrs, mask=mask, other=0.0).to(ACC)
        if delta_bias_ptr is not None:
            delta += tl.load(delta_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
        if DROPOUT:
            delta = _dropped(
                delta, seed_ptr, stream, start, 0, threshold, keep_scale, BLOCK_M, BLOCK_N
            )
        residual = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
        total = (residual + delta).to(total_ptr.dtype.element_ty)
        total_ptrs = _tile_ptrs(total_ptr, n_cols, start, offs_m, offs_n)
        tl.store(total_ptrs, total, mask=mask)
        x = total.to(ACC)

    # Padding is 0. A constant row's mean is what it holds: its variance must be 0.
    mean = rounded_quotient(tl.sum(x, axis=1), tl.cast(n_cols, ACC))
    centred = tl.where(mask_n[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)

    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    y = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]

    y_ptrs = _tile_ptrs(y_ptr, n_cols, start, offs_m, offs_n)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + start + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + start + offs_m, rstd, mask=mask_m)


# ------------------------------------------------------------------------------------- backward


@triton.jit
def _load_tile(
    dy_ptr, x_ptr, x_stride_row, mean_ptr, rstd_ptr, start, offs_m, offs_n, n_rows, n_cols,
    ACC: tl.constexpr,
):  # fmt: skip
    """dy, x̂ and rstd of a tile. Outside the matrix dy is 0, so that padding adds to no sum."""
    mask_m = start + offs_m < n_rows
    mask = mask_m[:, None] & (offs_n < n_cols)[None, :]
    x_ptrs = _tile_ptrs(x_ptr, x_stride_row, start, offs_m, offs_n)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    dy_ptrs = _tile_ptrs(dy_ptr, n_cols, start, offs_m, offs_n)
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACC)
    mean = tl.load(mean_ptr + start + offs_m, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + start + offs_m, mask=mask_m, other=0.0)
    return dy, (x - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def _store_partial(partial_ptr, parameter, acc, offs_n, n_cols):
    """The sum over the rows of this program's band, for one parameter."""
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
    """What the next kernel needs of a row, where a row is too wide for one tile of it."""
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
    means_ptr,  # (2, n_rows), or None: the tile spans the row, so they are at hand
    dx_ptr,  # (n_rows, n_cols), contiguous: dx, or dresidual
    ddelta_ptr,  # (n_rows, n_cols), contiguous, or None: it is equal to dx, or there is no delta
    partial_ptr,  # (1 to 3, programs, n_cols): dweight, dbias, ddelta_bias
    seed_ptr,  # (1), read only if DROPOUT
    stream,
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
):
    start_n = tl.program_id(1) * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_cols
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    acc_dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_ddelta_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)

    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, n_rows), BLOCK_M):
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
            dtotal_ptrs = _tile_ptrs(dtotal_ptr, n_cols, start, offs_m, offs_n)
            dx += tl.load(dtotal_ptrs, mask=mask, other=0.0).to(ACC)
        dx_ptrs = _tile_ptrs(dx_ptr, n_cols, start, offs_m, offs_n)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        ddelta = dx
        if DROPOUT:
            ddelta = _dropped(
                dx, seed_ptr, stream, start, start_n, threshold, keep_scale, BLOCK_M, BLOCK_N
            )
        if ddelta_ptr is not None:
            ddelta_ptrs = _tile_ptrs(ddelta_ptr, n_cols, start, offs_m, offs_n)
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


@triton.jit
def _sum_bands_kernel(
    partial_ptr,  # (1 to 3, n_bands, n_cols), one matrix for each of...
    out0_ptr,  # (n_cols)
    out1_ptr,  # (n_cols), or None
    out2_ptr,  # (n_cols), or None
    n_bands,
    n_cols,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    parameter = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_cols
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, n_bands, BLOCK_M):
        rows = (parameter * n_bands + start + offs_m).to(tl.int64)
        mask = (start + offs_m < n_bands)[:, None] & mask_n[None, :]
        acc += tl.load(partial_ptr + rows[:, None] * n_cols + offs_n[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0).to(out0_ptr.dtype.element_ty)
    if parameter == 0:
        tl.store(out0_ptr + offs_n, total, mask=mask_n)
    if out1_ptr is not None:
        if parameter == 1:
            tl.store(out1_ptr + offs_n, total, mask=mask_n)
    if out2_ptr is not None:
        if parameter == 2:
            tl.store(out2_ptr + offs_n, total, mask=mask_n)
