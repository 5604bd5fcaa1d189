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

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _common
from fastgpt.kernels._common import dropout_keep

MAX_WIDTH = 16384

# Numbers whose being 1 or divisible by 16 would gain nothing but further compilations.
NOT_SPECIALISED = ["n_rows", "rows_per_program", "stream", "threshold"]


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
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < n_rows, offs_n < n_cols
    mask = mask_m[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * n_cols + offs_n[None, :]  # into what is contiguous

    x_ptrs = x_ptr + offs_m[:, None] * x_stride_row + offs_n[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    if delta_ptr is not None:
        delta_ptrs = delta_ptr + offs_m[:, None] * delta_stride_row + offs_n[None, :]
        delta = tl.load(delta_ptrs, mask=mask, other=0.0).to(ACC)
        if delta_bias_ptr is not None:
            delta += tl.load(delta_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
        if DROPOUT:
            seed, rows = tl.load(seed_ptr), offs_m.to(tl.int32)
            keep = dropout_keep(seed, stream, 0, 0, rows, threshold, BLOCK_M, BLOCK_N)
            delta = tl.where(keep, delta * keep_scale, 0.0)
        total = (x + delta).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offs, total, mask=mask)
        x = total.to(ACC)

    mean = tl.sum(x, axis=1) / n_cols  # padding is 0
    centred = tl.where(mask_n[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)

    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    y = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]

    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


# ------------------------------------------------------------------------------------- backward


@triton.jit
def _load_tile(
    dy_ptr, x_ptr, x_stride_row, mean_ptr, rstd_ptr, offs_m, offs_n, n_rows, n_cols,
    ACC: tl.constexpr,
):  # fmt: skip
    """dy, x̂ and rstd of a tile. Outside the matrix dy is 0, so that padding adds to no sum."""
    mask_m = offs_m < n_rows
    mask = mask_m[:, None] & (offs_n < n_cols)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * x_stride_row + offs_n[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    dy_ptrs = dy_ptr + offs_m[:, None] * n_cols + offs_n[None, :]
    dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(ACC)
    mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
    return dy, (x - mean[:, None]) * rstd[:, None], rstd


@triton.jit
def _store_partial(partial_ptr, parameter, acc, offs_n, n_cols):
    """The sum over the rows of this program's band, for one parameter."""
    row = (parameter * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    tl.store(partial_ptr + row * n_cols + offs_n, tl.sum(acc, axis=0), mask=offs_n < n_cols)


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=["seed_ptr"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # (n_rows, n_cols), contiguous
    dtotal_ptr,  # (n_rows, n_cols), contiguous, or None: zero
    x_ptr,  # (n_rows, n_cols), columns adjacent: x, or total
    x_stride_row,
    weight_ptr,  # (n_cols)
    mean_ptr,  # (n_rows)
    rstd_ptr,  # (n_rows)
    dx_ptr,  # (n_rows, n_cols), contiguous: dx, or dresidual
    ddelta_ptr,  # (n_rows, n_cols), contiguous, or None: nobody needs it apart from dx
    partial_ptr,  # (1 to 3, programs, n_cols): dweight, dbias, ddelta_bias; written if PARTIALS
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
    PARTIALS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_cols
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    acc_dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_ddelta_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)

    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, n_rows), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        offs = offs_m[:, None] * n_cols + offs_n[None, :]
        mask = (offs_m < n_rows)[:, None] & mask_n[None, :]
        dy, x_hat, rstd = _load_tile(
            dy_ptr, x_ptr, x_stride_row, mean_ptr, rstd_ptr, offs_m, offs_n, n_rows, n_cols, ACC
        )
        w = weight[None, :] * dy
        mean_w = tl.sum(w, axis=1) / n_cols
        mean_wx = tl.sum(w * x_hat, axis=1) / n_cols
        dx = (w - mean_w[:, None] - x_hat * mean_wx[:, None]) * rstd[:, None]
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + offs, mask=mask, other=0.0).to(ACC)
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        ddelta = dx
        if DROPOUT:
            seed, rows = tl.load(seed_ptr), offs_m.to(tl.int32)
            keep = dropout_keep(seed, stream, 0, 0, rows, threshold, BLOCK_M, BLOCK_N)
            ddelta = tl.where(keep, dx * keep_scale, 0.0)
        if ddelta_ptr is not None:
            tl.store(ddelta_ptr + offs, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)
        if PARTIALS:
            acc_dweight += dy * x_hat
            if HAS_BIAS:
                acc_dbias += dy
            if HAS_DELTA_BIAS:
                acc_ddelta_bias += ddelta

    if PARTIALS:
        _store_partial(partial_ptr, 0, acc_dweight, offs_n, n_cols)
        if HAS_BIAS:
            _store_partial(partial_ptr, 1, acc_dbias, offs_n, n_cols)
        if HAS_DELTA_BIAS:
            _store_partial(partial_ptr, 2 if HAS_BIAS else 1, acc_ddelta_bias, offs_n, n_cols)


@triton.jit
def _layer_norm_bwd_params_kernel(
    dy_ptr,  # (n_rows, n_cols), contiguous
    x_ptr,  # (n_rows, n_cols), columns adjacent: x, or total
    x_stride_row,
    mean_ptr,  # (n_rows)
    rstd_ptr,  # (n_rows)
    ddelta_ptr,  # (n_rows, n_cols), contiguous, read only if HAS_DELTA_BIAS
    partial_ptr,  # (1 to 3, programs, n_cols): dweight, dbias, ddelta_bias
    n_rows,
    n_cols,
    rows_per_program,  # a multiple of BLOCK_M
    HAS_BIAS: tl.constexpr,
    HAS_DELTA_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc_dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_ddelta_bias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)

    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, n_rows), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        dy, x_hat, _ = _load_tile(
            dy_ptr, x_ptr, x_stride_row, mean_ptr, rstd_ptr, offs_m, offs_n, n_rows, n_cols, ACC
        )
        acc_dweight += dy * x_hat
        if HAS_BIAS:
            acc_dbias += dy
        if HAS_DELTA_BIAS:
            offs = offs_m[:, None] * n_cols + offs_n[None, :]
            mask = (offs_m < n_rows)[:, None] & (offs_n < n_cols)[None, :]
            acc_ddelta_bias += tl.load(ddelta_ptr + offs, mask=mask, other=0.0).to(ACC)

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


# --------------------------------------------------------------------------------- launch table

# One tile spans a whole row, 16 to 32 elements a thread. Chosen by ahead-of-time compilation
# (registers, no spill on sm_80, sm_90, sm_100), not yet measured. Past MAX_FUSED_WIDTH the
# parameters' gradients no longer fit into the registers beside dx: a kernel of their own reads x
# and dy again.
MAX_FUSED_WIDTH = 8192


def _launch(n_cols: int, elements: int) -> dict[str, int]:
    """Tile and warps for a kernel that keeps about ``elements`` of a row block in flight."""
    block_n = max(32, triton.next_power_of_2(n_cols))
    block_m = max(1, min(16, elements // block_n))
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=max(4, block_n // 512))


_PARAMS_LAUNCH = dict(BLOCK_M=16, BLOCK_N=128, num_warps=4)
_BANDS_LAUNCH = dict(BLOCK_M=128, BLOCK_N=16, num_warps=4)


# --------------------------------------------------------------------------------- host functions


def statistic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    """(..., N) → (M, N) with adjacent columns; copied only where no view can say it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    delta_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    stream: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """y and, if there is a delta, total, both with the shape of x, contiguous; mean, rstd (M)."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    total = None if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, delta_rows = _rows(x), None if delta is None else _rows(delta)
    n_rows, n_cols = rows.shape
    mean = torch.empty(n_rows, dtype=statistic(x), device=x.device)
    rstd = torch.empty_like(mean)
    threshold, keep_scale = _common.dropout_numbers(dropout_p)
    if n_rows:
        launch = _launch(n_cols, elements=4096)
        with _common.on_device(x):
            _layer_norm_fwd_kernel[(triton.cdiv(n_rows, launch["BLOCK_M"]),)](
                rows,
                rows.stride(0),
                delta_rows,
                0 if delta_rows is None else delta_rows.stride(0),
                _contiguous(delta_bias),
                total,
                weight.contiguous(),
                _contiguous(bias),
                y,
                mean,
                rstd,
                seed,
                stream,
                n_rows,
                n_cols,
                eps,
                threshold,
                keep_scale,
                DROPOUT=threshold > 0,
                ACC=_common.accumulator(x.dtype),
                **launch,
            )
    return y, total, mean, rstd


def backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    stream: int,
    dx: Tensor,
    ddelta: Tensor | None,
    dweight: Tensor,
    dbias: Tensor | None,
    ddelta_bias: Tensor | None,
) -> None:
    """Writes the contiguous dx (or dresidual), dweight and those that are not None of ddelta, which
    is else equal to dx, dbias and ddelta_bias. ``x``: the plain op's x, or total."""
    rows, dy, dtotal = _rows(x), dy.contiguous(), _contiguous(dtotal)
    n_rows, n_cols = rows.shape
    params = [p for p in (dweight, dbias, ddelta_bias) if p is not None]
    if n_rows == 0:
        for p in params:
            p.zero_()
        return

    fused = n_cols <= MAX_FUSED_WIDTH
    launch = _launch(n_cols, elements=2048)
    tile_rows = launch["BLOCK_M"] if fused else _PARAMS_LAUNCH["BLOCK_M"]
    programs = min(4 * _common.multiprocessors(x.device), triton.cdiv(n_rows, tile_rows))
    rows_per_program = triton.cdiv(triton.cdiv(n_rows, tile_rows), programs) * tile_rows
    programs = triton.cdiv(n_rows, rows_per_program)
    partial = torch.empty(len(params), programs, n_cols, dtype=mean.dtype, device=x.device)
    threshold, keep_scale = _common.dropout_numbers(dropout_p)
    acc = _common.accumulator(x.dtype)
    flags = dict(HAS_BIAS=dbias is not None, HAS_DELTA_BIAS=ddelta_bias is not None, ACC=acc)
    with _common.on_device(x):
        _layer_norm_bwd_kernel[(programs,)](
            dy,
            dtotal,
            rows,
            rows.stride(0),
            weight.contiguous(),
            mean,
            rstd,
            dx,
            ddelta,
            partial,
            seed,
            stream,
            n_rows,
            n_cols,
            rows_per_program,
            threshold,
            keep_scale,
            DROPOUT=threshold > 0,
            PARTIALS=fused,
            **flags,
            **launch,
        )
        if not fused:
            _layer_norm_bwd_params_kernel[
                (programs, triton.cdiv(n_cols, _PARAMS_LAUNCH["BLOCK_N"]))
            ](
                dy,
                rows,
                rows.stride(0),
                mean,
                rstd,
                dx if ddelta is None else ddelta,
                partial,
                n_rows,
                n_cols,
                rows_per_program,
                **flags,
                **_PARAMS_LAUNCH,
            )
        _sum_bands_kernel[(triton.cdiv(n_cols, _BANDS_LAUNCH["BLOCK_N"]), len(params))](
            partial,
            *params,
            *[None] * (3 - len(params)),
            programs,
            n_cols,
            ACC=acc,
            **_BANDS_LAUNCH,
        )
