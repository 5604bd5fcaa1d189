"""LayerNorm's forward kernel and its launcher, and helpers that the backward shares. See
``layer_norm.py`` for the equations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _host, configs
from fastgpt.kernels._device_math import dropout_keep, rounded_quotient
from fastgpt.kernels._tensors import as_matrix

# Specialising on the values of these arguments gains nothing and causes recompilations.
NOT_SPECIALISED = ["n_rows", "rows_per_program", "dropout_offset", "threshold"]


@triton.jit
def tile_ptrs(ptr, stride_row, start, offs_m, offs_n):
    """Pointers to a tile whose first row is ``start``. Only the offset of that row needs 64 bits;
    32-bit offsets within the tile save registers."""
    return (
        ptr
        + tl.cast(start, tl.int64) * stride_row
        + (offs_m[:, None] * stride_row + offs_n[None, :])
    )


@triton.jit
def dropped(
    x, seed_ptr, dropout_offset, start, start_col, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Dropout of a tile whose first element is (start, start_col)."""
    rows = (start + tl.arange(0, BLOCK_M)).to(tl.int32)
    seed = tl.load(seed_ptr)
    keep = dropout_keep(seed, dropout_offset, 0, start_col, rows, threshold, BLOCK_M, BLOCK_N)
    return tl.where(keep, x * keep_scale, 0.0)


@triton.jit(do_not_specialize=NOT_SPECIALISED, do_not_specialize_on_alignment=["seed_ptr"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (n_rows, n_cols), columns adjacent: the plain op's x, or the residual
    x_stride_row,
    delta_ptr,  # (n_rows, n_cols), columns adjacent; None in the plain op
    delta_stride_row,
    delta_bias_ptr,  # (n_cols), or None
    total_ptr,  # (n_rows, n_cols), contiguous; None in the plain op
    weight_ptr,  # (n_cols)
    bias_ptr,  # (n_cols), or None
    y_ptr,  # (n_rows, n_cols), contiguous
    mean_ptr,  # (n_rows)
    rstd_ptr,  # (n_rows)
    seed_ptr,  # (1), read only if DROPOUT
    dropout_offset,
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

    x_ptrs = tile_ptrs(x_ptr, x_stride_row, start, offs_m, offs_n)
    if delta_ptr is None:
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    else:
        delta_ptrs = tile_ptrs(delta_ptr, delta_stride_row, start, offs_m, offs_n)
        delta = tl.load(delta_ptrs, mask=mask, other=0.0).to(ACC)
        if delta_bias_ptr is not None:
            delta += tl.load(delta_bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]
        if DROPOUT:
            delta = dropped(
                delta, seed_ptr, dropout_offset, start, 0, threshold, keep_scale, BLOCK_M, BLOCK_N
            )
        residual = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
        total = (residual + delta).to(total_ptr.dtype.element_ty)
        total_ptrs = tile_ptrs(total_ptr, n_cols, start, offs_m, offs_n)
        tl.store(total_ptrs, total, mask=mask)
        x = total.to(ACC)

    # Padding is 0. The quotient is correctly rounded so that a constant row has variance 0.
    mean = rounded_quotient(tl.sum(x, axis=1), tl.cast(n_cols, ACC))
    centred = tl.where(mask_n[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)

    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    y = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]

    y_ptrs = tile_ptrs(y_ptr, n_cols, start, offs_m, offs_n)
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + start + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + start + offs_m, rstd, mask=mask_m)


def as_rows(x: Tensor) -> Tensor:
    """(..., N) → (M, N) with adjacent columns. Copied only if no such view exists, or if offsets
    within a tile could exceed 2^31."""
    rows = as_matrix(x)
    return rows if rows.stride(1) == 1 and rows.stride(0) < 2**26 else rows.contiguous()


def contiguous_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def whole_rows(x: Tensor, kernel: str) -> tuple[dict[str, int], int | None]:
    """Launch arguments for a kernel whose tile spans a whole row of x, and the number of programs
    per multiprocessor if the launch table gives one."""
    block_n = max(32, _host.next_power_of_2(x.shape[-1]))
    config = configs.find(x, "layer_norm", kernel, block_n)
    return dict(BLOCK_N=block_n, **configs.launch(config)), getattr(config, "programs", None)


def layer_norm_fwd(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    delta_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    dropout_offset: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and total, contiguous, with the shape of x; mean and rstd (M). Without a delta, total is
    empty because an operator must not return its input."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    total = None if delta is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, delta_rows = as_rows(x), None if delta is None else as_rows(delta)
    n_rows, n_cols = rows.shape
    mean = torch.empty(n_rows, dtype=_host.stats_dtype(x.dtype), device=x.device)
    rstd = torch.empty_like(mean)
    if n_rows:
        launch, _ = whole_rows(x, "fwd")
        with _host.on_device(x):
            _layer_norm_fwd_kernel[(_host.cdiv(n_rows, launch["BLOCK_M"]),)](
                rows,
                rows.stride(0),
                delta_rows,
                0 if delta_rows is None else delta_rows.stride(0),
                contiguous_or_none(delta_bias),
                total,
                weight.contiguous(),
                contiguous_or_none(bias),
                y,
                mean,
                rstd,
                seed,
                dropout_offset,
                n_rows,
                n_cols,
                eps,
                **_host.dropout_arguments(dropout_p),
                ACC=_host.accumulator(x.dtype),
                **launch,
            )
    return y, x.new_empty(0) if total is None else total, mean, rstd
