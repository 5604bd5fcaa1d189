"""Residual sum, dropout and LayerNorm in one pass: operator and public function.

The equations, what is saved, bytes and FLOPs stand in ``layer_norm_kernels.py``.
"""

import torch
from torch import Tensor

from fastgpt.kernels import _checks, _host
from fastgpt.kernels.layer_norm import (
    check_width,
    layer_norm_bwd,
    layer_norm_fwd,
    statistic,
)


@torch.library.custom_op("fastgpt::residual_layer_norm", mutates_args=())
def _residual_layer_norm_op(
    residual: Tensor,
    delta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta_bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout_p: float,
    stream: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y and total with the shape of residual, contiguous; mean and rstd (M)."""
    y, total, mean, rstd = layer_norm_fwd(
        residual, delta, weight, bias, delta_bias, seed, eps, dropout_p, stream, out_dtype
    )
    assert total is not None
    return y, total, mean, rstd


@_residual_layer_norm_op.register_fake
def _(residual, delta, weight, bias, delta_bias, seed, eps, dropout_p, stream, out_dtype):
    y, total = (residual.new_empty(residual.shape, dtype=d) for d in (out_dtype, residual.dtype))
    mean = residual.new_empty(residual.numel() // residual.shape[-1], dtype=statistic(residual))
    return y, total, mean, torch.empty_like(mean)


def _gradients(
    total: Tensor, weight: Tensor, ddelta_dtype: torch.dtype | None, n_params: int
) -> list[Tensor]:
    """Memory for dresidual, ddelta unless its dtype is None, and 1 to 3 parameters' gradients."""
    activations = [total.dtype] if ddelta_dtype is None else [total.dtype, ddelta_dtype]
    return [
        *(total.new_empty(total.shape, dtype=dtype) for dtype in activations),
        *(weight.new_empty(weight.shape) for _ in range(n_params)),
    ]


@torch.library.custom_op("fastgpt::residual_layer_norm_bwd", mutates_args=())
def _residual_layer_norm_bwd_op(
    dy: Tensor,
    dtotal: Tensor | None,
    total: Tensor,
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
    """dresidual; ddelta if it has a dtype; dweight; dbias and ddelta_bias if there are such."""
    gradients = _gradients(total, weight, ddelta_dtype, 1 + has_bias + has_delta_bias)
    rest = iter(gradients)
    layer_norm_bwd(
        dy,
        dtotal,
        total,
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


@_residual_layer_norm_bwd_op.register_fake
def _(
    dy, dtotal, total, weight, mean, rstd, seed, dropout_p, stream, ddelta_dtype, has_bias,
    has_delta_bias,
):  # fmt: skip
    return _gradients(total, weight, ddelta_dtype, 1 + has_bias + has_delta_bias)


def _setup_context(ctx, inputs, output):
    residual, delta, weight, bias, delta_bias, seed, _, ctx.dropout_p, ctx.stream, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd, seed)
    # Without dropout and with one dtype, one tensor is the gradient of residual and of delta.
    apart = seed is not None or delta.dtype != residual.dtype
    ctx.ddelta_dtype = delta.dtype if apart else None
    ctx.has_bias, ctx.has_delta_bias = bias is not None, delta_bias is not None
    ctx.set_materialize_grads(False)  # no zeros where total, mean and rstd have no consumer


def _backward(ctx, dy, dtotal, _dmean, _drstd):
    if dy is None and dtotal is None:
        return (*[None] * 10,)
    total = ctx.saved_tensors[0]
    gradients = _residual_layer_norm_bwd_op(
        torch.zeros_like(total) if dy is None else dy,
        dtotal,
        *ctx.saved_tensors,
        ctx.dropout_p,
        ctx.stream,
        ctx.ddelta_dtype,
        ctx.has_bias,
        ctx.has_delta_bias,
    )
    rest = iter(gradients)
    dresidual = next(rest)
    ddelta = dresidual if ctx.ddelta_dtype is None else next(rest)
    dweight = next(rest)
    dbias = next(rest) if ctx.has_bias else None
    ddelta_bias = next(rest) if ctx.has_delta_bias else None
    return dresidual, ddelta, dweight, dbias, ddelta_bias, *[None] * 5


_residual_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


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
    check_width("residual", residual)
    seed = _host.drawn_seed(seed, dropout_p, residual.device)
    y, total, _, _ = _residual_layer_norm_op(
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
