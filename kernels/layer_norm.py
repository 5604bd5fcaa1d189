"""LayerNorm (Ba et al. 2016) over the last dimension, forward and backward.

    y = (x - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps)

x and y are (M, N) after flattening; weight and bias (N). Saved for backward: x, weight and, in
float32, mean and rstd (M each). With x̂ = (x - mean) * rstd and w = weight * dy, per row:

    dx = rstd * (w - sum(w) / N - x̂ * sum(w * x̂) / N)
    dweight = sum over rows of dy * x̂            dbias = sum over rows of dy

Bytes moved, s an element: 2s forward (x in, y out), 3s backward (x and dy in, dx out); about 8 and
14 FLOPs an element, so memory bounds both. dweight and dbias are summed in float32 by one program
per band of rows, then over the bands in a fixed order: no atomics, so two runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _checks, _common

MAX_WIDTH = 16384


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (n_rows, n_cols), columns adjacent
    x_stride_row,
    weight_ptr,  # (n_cols)
    bias_ptr,  # (n_cols), read only if HAS_BIAS
    y_ptr,  # (n_rows, n_cols), contiguous
    mean_ptr,  # (n_rows)
    rstd_ptr,  # (n_rows)
    n_rows,
    n_cols,
    eps,
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < n_rows, offs_n < n_cols
    mask = mask_m[:, None] & mask_n[None, :]

    x_ptrs = x_ptr + offs_m[:, None] * x_stride_row + offs_n[None, :]
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(ACC)
    mean = tl.sum(x, axis=1) / n_cols
    centred = tl.where(mask_n[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / n_cols + eps)

    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)
    y = centred * rstd[:, None] * weight[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(ACC)[None, :]

    y_ptrs = y_ptr + offs_m[:, None] * n_cols + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


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
def _store_partials(partial_ptr, dweight, dbias, offs_n, n_cols, HAS_BIAS: tl.constexpr):
    """The sums over a band of rows: dweight, then dbias if there is one, n_cols each."""
    mask_n = offs_n < n_cols
    partial_ptr += tl.program_id(0).to(tl.int64) * n_cols * (2 if HAS_BIAS else 1)
    tl.store(partial_ptr + offs_n, tl.sum(dweight, axis=0), mask=mask_n)
    if HAS_BIAS:
        tl.store(partial_ptr + n_cols + offs_n, tl.sum(dbias, axis=0), mask=mask_n)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # (n_rows, n_cols), contiguous
    x_ptr,  # (n_rows, n_cols), columns adjacent
    x_stride_row,
    weight_ptr,  # (n_cols)
    mean_ptr,  # (n_rows)
    rstd_ptr,  # (n_rows)
    dx_ptr,  # (n_rows, n_cols), contiguous
    partial_ptr,  # (programs, 1 or 2, n_cols), written if PARTIALS
    n_rows,
    n_cols,
    rows_per_program,  # a multiple of BLOCK_M
    HAS_BIAS: tl.constexpr,
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

    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, n_rows), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        dy, x_hat, rstd = _load_tile(
            dy_ptr, x_ptr, x_stride_row, mean_ptr, rstd_ptr, offs_m, offs_n, n_rows, n_cols, ACC
        )
        w = weight[None, :] * dy
        mean_w = tl.sum(w, axis=1) / n_cols
        mean_wx = tl.sum(w * x_hat, axis=1) / n_cols
        dx = (w - mean_w[:, None] - x_hat * mean_wx[:, None]) * rstd[:, None]
        dx_ptrs = dx_ptr + offs_m[:, None] * n_cols + offs_n[None, :]
        mask = (offs_m < n_rows)[:, None] & mask_n[None, :]
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if PARTIALS:
            acc_dweight += dy * x_hat
            if HAS_BIAS:
                acc_dbias += dy

    if PARTIALS:
        _store_partials(partial_ptr, acc_dweight, acc_dbias, offs_n, n_cols, HAS_BIAS)


@triton.jit
def _layer_norm_bwd_params_kernel(
    dy_ptr,  # (n_rows, n_cols), contiguous
    x_ptr,  # (n_rows, n_cols), columns adjacent
    x_stride_row,
    mean_ptr,  # (n_rows)
    rstd_ptr,  # (n_rows)
    partial_ptr,  # (programs, 1 or 2, n_cols)
    n_rows,
    n_cols,
    rows_per_program,  # a multiple of BLOCK_M
    HAS_BIAS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc_dweight = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_dbias = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)

    first = tl.program_id(0).to(tl.int64) * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, n_rows), BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        dy, x_hat, _ = _load_tile(
            dy_ptr, x_ptr, x_stride_row, mean_ptr, rstd_ptr, offs_m, offs_n, n_rows, n_cols, ACC
        )
        acc_dweight += dy * x_hat
        if HAS_BIAS:
            acc_dbias += dy

    _store_partials(partial_ptr, acc_dweight, acc_dbias, offs_n, n_cols, HAS_BIAS)


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


def _rows(x: Tensor) -> Tensor:
    """(..., N) → (M, N) with adjacent columns; copied only where no view can say it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y with the shape of x, contiguous; mean and rstd (M)."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    rows = _rows(x)
    n_rows, n_cols = rows.shape
    statistic = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = torch.empty(n_rows, dtype=statistic, device=x.device)
    rstd = torch.empty_like(mean)
    if n_rows:
        launch = _launch(n_cols, elements=4096)
        with _common.on_device(x):
            _layer_norm_fwd_kernel[(triton.cdiv(n_rows, launch["BLOCK_M"]),)](
                rows,
                rows.stride(0),
                weight.contiguous(),
                None if bias is None else bias.contiguous(),
                y,
                mean,
                rstd,
                n_rows,
                n_cols,
                eps,
                HAS_BIAS=bias is not None,
                ACC=_common.accumulator(x.dtype),
                **launch,
            )
    return y, mean, rstd


def _layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor]:
    """dx with the shape of x, contiguous; the parameters' gradients (1 or 2, N)."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, dy = _rows(x), dy.contiguous()
    n_rows, n_cols = rows.shape
    n_params = 2 if has_bias else 1
    if n_rows == 0:
        return dx, torch.zeros(n_params, n_cols, dtype=weight.dtype, device=x.device)

    fused = n_cols <= MAX_FUSED_WIDTH
    launch = _launch(n_cols, elements=2048)
    tile_rows = launch["BLOCK_M"] if fused else _PARAMS_LAUNCH["BLOCK_M"]
    programs = min(4 * _common.multiprocessors(x.device), triton.cdiv(n_rows, tile_rows))
    rows_per_program = triton.cdiv(triton.cdiv(n_rows, tile_rows), programs) * tile_rows
    programs = triton.cdiv(n_rows, rows_per_program)
    partial = torch.empty(programs, n_params, n_cols, dtype=mean.dtype, device=x.device)
    flags = dict(HAS_BIAS=has_bias, ACC=_common.accumulator(x.dtype))
    with _common.on_device(x):
        _layer_norm_bwd_kernel[(programs,)](
            dy,
            rows,
            rows.stride(0),
            weight.contiguous(),
            mean,
            rstd,
            dx,
            partial,
            n_rows,
            n_cols,
            rows_per_program,
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
                partial,
                n_rows,
                n_cols,
                rows_per_program,
                **flags,
                **_PARAMS_LAUNCH,
            )
    return dx, partial.sum(0).to(weight.dtype)


_layer_norm_op = torch.library.custom_op("fastgpt::layer_norm", _layer_norm_fwd, mutates_args=())
_layer_norm_bwd_op = torch.library.custom_op(
    "fastgpt::layer_norm_bwd", _layer_norm_bwd, mutates_args=()
)


@_layer_norm_op.register_fake
def _(x, weight, bias, eps, out_dtype):
    statistic = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=statistic)
    return x.new_empty(x.shape, dtype=out_dtype), mean, torch.empty_like(mean)


@_layer_norm_bwd_op.register_fake
def _(dy, x, weight, mean, rstd, has_bias):
    return x.new_empty(x.shape), weight.new_empty(2 if has_bias else 1, x.shape[-1])


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.has_bias = bias is not None


def _backward(ctx, dy, _dmean, _drstd):
    dx, dparams = _layer_norm_bwd_op(dy, *ctx.saved_tensors, ctx.has_bias)
    return dx, dparams[0], dparams[1] if ctx.has_bias else None, None, None


_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer normalisation over the last dimension (Ba et al. 2016, arXiv:1607.06450).

    Args:
        x: (..., N), any strides, N up to 16,384; float32, float16 or bfloat16, on a CUDA device.
        weight: (N,), of x's dtype or float32.
        bias: (N,), of weight's dtype, or None.
        eps: added to the variance, at least 0.

    Returns:
        A contiguous tensor with the shape of x. Its dtype is x's; under autocast it is autocast's,
        since the Linear behind a LayerNorm would round it so in a pass of its own. Statistics and
        sums are float32.

    Raises:
        TypeError: x, weight or bias is no floating-point tensor, or of another dtype.
        ValueError: shapes, dtypes or devices do not go together, N > 16,384, or eps < 0.
    """
    _checks.layer_norm(x, weight, bias, eps)
    _common.launchable(x=x, weight=weight, bias=bias)
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x must have a last dimension of at most {MAX_WIDTH}, got {x.shape[-1]}")
    return _layer_norm_op(x, weight, bias, eps, _common.autocast_dtype(x))[0]
