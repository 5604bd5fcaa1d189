"""LayerNorm (Ba et al. 2016), plain or of a residual sum: launch table, host functions, operator,
public functions ``layer_norm`` and ``residual_layer_norm``.

The equations, what is saved, bytes and FLOPs stand in ``layer_norm_kernels.py``.
"""

import torch
import triton
from torch import Tensor

from fastgpt.kernels import _checks, _host, configs
from fastgpt.kernels.layer_norm_kernels import (
    _layer_norm_bwd_kernel,
    _layer_norm_bwd_means_kernel,
    _layer_norm_fwd_kernel,
    _sum_bands_kernel,
)

MAX_WIDTH = 16384

# A tile of the backward also keeps the sums of the parameters' gradients. Past MAX_FUSED_WIDTH they
# no longer fit into the registers beside a whole row: a kernel of its own finds the means of a row,
# and the tiles are narrow.
MAX_FUSED_WIDTH = 4096


def _whole_rows(x: Tensor, kernel: str) -> dict[str, int]:
    """The launch of a kernel whose tile is as wide as x's rows."""
    block_n = max(32, triton.next_power_of_2(x.shape[-1]))
    return dict(BLOCK_N=block_n, **configs.launch(configs.find(x, "layer_norm", kernel, block_n)))


# --------------------------------------------------------------------------------- host functions


def statistic(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    """(..., N) → (M, N) with adjacent columns; copied only where no view can say it, or where the
    distances inside a tile may pass 2^31."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 and rows.stride(0) < 2**26 else rows.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def layer_norm_fwd(
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
    threshold, keep_scale = _host.dropout_numbers(dropout_p)
    if n_rows:
        launch = _whole_rows(x, "fwd")
        with _host.on_device(x):
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
                ACC=_host.accumulator(x.dtype),
                **launch,
                **_host.FMA,
            )
    return y, total, mean, rstd


def layer_norm_bwd(
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

    row_launch = _whole_rows(x, "bwd")
    fused = n_cols <= MAX_FUSED_WIDTH
    launch = row_launch
    if not fused:
        launch = configs.launch(configs.find(x, "layer_norm", "bwd_narrow"))
    sums = configs.launch(configs.find(x, "layer_norm", "sum_bands"))
    tiles = triton.cdiv(n_rows, launch["BLOCK_M"])
    resident = 3 if dropout_p else 4  # of a multiprocessor's registers, at 768 columns in bfloat16
    programs = min(resident * _host.multiprocessors(x.device), tiles)
    rows_per_program = triton.cdiv(tiles, programs) * launch["BLOCK_M"]
    programs = triton.cdiv(n_rows, rows_per_program)
    partial = torch.empty(len(params), programs, n_cols, dtype=mean.dtype, device=x.device)
    threshold, keep_scale = _host.dropout_numbers(dropout_p)
    acc = _host.accumulator(x.dtype)
    inputs = rows, rows.stride(0), weight.contiguous(), mean, rstd
    means = None if fused else torch.empty(2, n_rows, dtype=mean.dtype, device=x.device)
    with _host.on_device(x):
        if not fused:
            _layer_norm_bwd_means_kernel[(triton.cdiv(n_rows, row_launch["BLOCK_M"]),)](
                dy, *inputs, means, n_rows, n_cols, ACC=acc, **row_launch, **_host.FMA
            )
        _layer_norm_bwd_kernel[(programs, triton.cdiv(n_cols, launch["BLOCK_N"]))](
            dy,
            dtotal,
            *inputs,
            means,
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
            HAS_BIAS=dbias is not None,
            HAS_DELTA_BIAS=ddelta_bias is not None,
            DROPOUT=threshold > 0,
            ACC=acc,
            **launch,
            **_host.FMA,
        )
        _sum_bands_kernel[(triton.cdiv(n_cols, sums["BLOCK_N"]), len(params))](
            partial,
            *params,
            *[None] * (3 - len(params)),
            programs,
            n_cols,
            ACC=acc,
            **sums,
            **_host.FMA,
        )


# ------------------------------------------------------------------------------------- operators


@torch.library.custom_op("fastgpt::layer_norm", mutates_args=())
def _layer_norm_op(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and total with the shape of x, contiguous; mean and rstd (M). Without a delta total is
    empty: an operator may not return its input."""
    y, total, mean, rstd = layer_norm_fwd(
        x, delta, weight, bias, delta_bias, seed, eps, dropout_p, stream, out_dtype
    )
    return y, x.new_empty(0) if total is None else total, mean, rstd


@_layer_norm_op.register_fake
def _(x, delta, weight, bias, delta_bias, seed, eps, dropout_p, stream, out_dtype):
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=statistic(x))
    total = x.new_empty(0 if delta is None else x.shape)
    return x.new_empty(x.shape, dtype=out_dtype), total, mean, torch.empty_like(mean)


def _gradients(
    x: Tensor, weight: Tensor, ddelta_dtype: torch.dtype | None, n_params: int
) -> list[Tensor]:
    """Memory for dx, ddelta unless its dtype is None, and 1 to 3 parameters' gradients."""
    activations = [x.dtype] if ddelta_dtype is None else [x.dtype, ddelta_dtype]
    return [
        *(x.new_empty(x.shape, dtype=dtype) for dtype in activations),
        *(weight.new_empty(weight.shape) for _ in range(n_params)),
    ]


@torch.library.custom_op("fastgpt::layer_norm_bwd", mutates_args=())
def _layer_norm_bwd_op(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    stream: int,
    ddelta_dtype: torch.dtype | None,
    has_bias: bool,
    has_delta_bias: bool,
) -> list[Tensor]:
    """dx; ddelta if it has a dtype; dweight; dbias and ddelta_bias if there are such. ``x``: the
    plain op's x, or total."""
    gradients = _gradients(x, weight, ddelta_dtype, 1 + has_bias + has_delta_bias)
    rest = iter(gradients)
    layer_norm_bwd(
        dy,
        dtotal,
        x,
        weight,
        mean,
        rstd,
        seed,
        dropout_p,
        stream,
        dx=next(rest),
        ddelta=None if ddelta_dtype is None else next(rest),
        dweight=next(rest),
        dbias=next(rest) if has_bias else None,
        ddelta_bias=next(rest) if has_delta_bias else None,
    )
    return gradients


@_layer_norm_bwd_op.register_fake
def _(
    dy, dtotal, x, weight, mean, rstd, seed, dropout_p, stream, ddelta_dtype, has_bias,
    has_delta_bias,
):  # fmt: skip
    return _gradients(x, weight, ddelta_dtype, 1 + has_bias + has_delta_bias)


def _setup_context(ctx, inputs, output):
    x, delta, weight, bias, delta_bias, seed, _, ctx.dropout_p, ctx.stream, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if delta is None else total, weight, mean, rstd, seed)
    # Without dropout and with one dtype, one tensor is the gradient of x and of delta.
    apart = delta is not None and (seed is not None or delta.dtype != x.dtype)
    ctx.ddelta_dtype = delta.dtype if apart else None
    ctx.has_delta = delta is not None
    ctx.has_bias, ctx.has_delta_bias = bias is not None, delta_bias is not None
    ctx.set_materialize_grads(False)  # no zeros for outputs without a consumer


def _backward(ctx, dy, dtotal, _dmean, _drstd):
    if not ctx.has_delta:
        dtotal = None
    if dy is None and dtotal is None:
        return (*[None] * 10,)
    x = ctx.saved_tensors[0]
    gradients = _layer_norm_bwd_op(
        torch.zeros_like(x) if dy is None else dy,
        dtotal,
        *ctx.saved_tensors,
        ctx.dropout_p,
        ctx.stream,
        ctx.ddelta_dtype,
        ctx.has_bias,
        ctx.has_delta_bias,
    )
    rest = iter(gradients)
    dx = ddelta = next(rest)
    if ctx.ddelta_dtype is not None:
        ddelta = next(rest)
    dweight = next(rest)
    dbias = next(rest) if ctx.has_bias else None
    ddelta_bias = next(rest) if ctx.has_delta_bias else None
    return dx, ddelta if ctx.has_delta else None, dweight, dbias, ddelta_bias, *[None] * 5


_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


# ------------------------------------------------------------------------------ public functions


def _check_width(name: str, x: Tensor) -> None:
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"{name} must have a last dimension of at most {MAX_WIDTH}, got {x.shape[-1]}"
        )


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
    _host.launchable(x=x, weight=weight, bias=bias)
    _check_width("x", x)
    out_dtype = _host.autocast_dtype(x)
    return _layer_norm_op(x, None, weight, bias, None, None, eps, 0.0, 0, out_dtype)[0]


def residual_layer_norm(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    delta_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """``total = residual + dropout(delta + delta_bias)`` and LayerNorm (Ba et al. 2016,
    arXiv:1607.06450) of it, in one pass forward and one backward.

    Args:
        residual: (..., N), any strides, N up to 16,384; float32, float16 or bfloat16, on a CUDA
            device.
        delta: shape of residual, any strides; of residual's dtype, or float16 or bfloat16.
        weight: (N,), of delta's dtype or float32.
        bias: (N,), of weight's dtype, or None.
        eps: added to the variance, at least 0.
        delta_bias: (N,), of weight's dtype, or None: added to delta before the dropout, the bias
            of the projection that made delta.
        dropout_p: share of delta that is set to 0, from 0 to 0.999, to the next 2^-16.
        seed: int64 tensor with one element on residual's device: the Philox key of the dropout
            mask, which is a function of seed, stream and position alone
            (``reference.dropout_mask`` of (M, N), the rows flattened). If None, each call draws one
            from PyTorch's generator for the device.
        stream: which of the independent masks of that seed, from 0 to 2^31 - 1.

    Returns:
        (y, total), contiguous, with the shape of residual. total has residual's dtype; y, the
        LayerNorm of the rounded total, has delta's, under autocast autocast's. Statistics and sums
        are float32.

    Raises:
        TypeError: an argument is no floating-point tensor, or of another dtype.
        ValueError: shapes, dtypes or devices do not go together, N > 16,384, or an argument is out
            of range.
    """
    _checks.residual_layer_norm(
        residual, delta, weight, bias, eps, delta_bias, dropout_p, seed, stream
    )
    _host.launchable(
        residual=residual, delta=delta, weight=weight, bias=bias, delta_bias=delta_bias
    )
    _check_width("residual", residual)
    seed = _host.drawn_seed(seed, dropout_p, residual.device)
    y, total, _, _ = _layer_norm_op(
        residual,
        delta,
        weight,
        bias,
        delta_bias,
        seed,
        eps,
        dropout_p,
        stream,
        _host.autocast_dtype(delta),
    )
    return y, total
