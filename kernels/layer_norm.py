"""LayerNorm (Ba et al. 2016) over the last dimension, plain or fused with the residual addition
before it. One operator serves ``layer_norm`` and ``residual_layer_norm``; the kernels and their
launchers are in ``layer_norm_fwd.py`` and ``layer_norm_bwd.py``.

    total = residual + dropout(delta + delta_bias)                 (or the plain op's x)
    y = (total - mean) * rstd * weight + bias        rstd = 1 / sqrt(var + eps)

All are (M, N) after flattening; weight, bias and delta_bias are (N). The statistics are computed
from total as stored, after rounding. Saved for backward: total (or x), weight, and mean and rstd
in float32, (M) each. Neither delta nor the dropout mask is saved: the mask is regenerated from the
seed. With x̂ = (total - mean) * rstd and w = weight * dy, per row:

    dresidual = dtotal + rstd * (w - sum(w) / N - x̂ * sum(w * x̂) / N)
    ddelta = dropout's backward of dresidual         ddelta_bias = sum over rows of ddelta
    dweight = sum over rows of dy * x̂                dbias = sum over rows of dy

Bytes moved at s bytes per element: plain 2s forward (x in, y out) and 3s backward (x, dy in, dx
out); with a residual 4s forward (residual, delta in, y, total out) and 4s backward (total, dy,
dtotal in, dresidual out), plus s for ddelta if it differs from dresidual, with dropout or in
another dtype. About 10 FLOPs per element forward and 16 backward, so both are memory-bound. One
program per block of rows sums the parameter gradients in float32; the blocks are then added in a
fixed order without atomics, so results are bitwise reproducible.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import _checks, _host
from fastgpt.kernels._operators import differentiable, fake, fill_none, operator
from fastgpt.kernels._tensors import row_count
from fastgpt.kernels.layer_norm_bwd import empty_gradients, layer_norm_bwd
from fastgpt.kernels.layer_norm_fwd import layer_norm_fwd

MAX_WIDTH = 16384


_BOTH = "layer_norm or residual_layer_norm"
_layer_norm_op = operator("layer_norm", ops=_BOTH)(layer_norm_fwd)


@fake(_layer_norm_op)
def _(x, delta, weight, bias, delta_bias, seed, eps, dropout_p, dropout_offset, out_dtype):
    mean = x.new_empty(row_count(x), dtype=_host.stats_dtype(x.dtype))
    total = x.new_empty(0 if delta is None else x.shape)
    return x.new_empty(x.shape, dtype=out_dtype), total, mean, torch.empty_like(mean)


_layer_norm_bwd_op = operator("layer_norm_bwd", ops=_BOTH)(layer_norm_bwd)


@fake(_layer_norm_bwd_op)
def _(dy, dtotal, x, weight, mean, rstd, seed, dropout_p, dropout_offset, *which):
    activations, params = empty_gradients(x, weight, *which)
    return activations + params


def _setup_context(ctx, inputs, output):
    x, delta, weight, bias, delta_bias, seed, _, *ctx.dropout, _ = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if delta is None else total, weight, mean, rstd, seed)
    ctx.delta_dtype = None if delta is None else delta.dtype
    ctx.has = bias is not None, delta_bias is not None
    ctx.set_materialize_grads(False)  # no zeros for outputs without a consumer


def norm_gradients(
    bwd: Callable[..., list[Tensor]],
    dy: Tensor | None,
    dtotal: Tensor | None,
    saved: Sequence[Any],
    dropout: tuple[float, int],
    delta_dtype: torch.dtype | None,
    *has: bool,
) -> tuple[Tensor | None, ...]:
    """dx, ddelta, dweight, dbias and ddelta_bias, computed by ``bwd``. ``saved``: x or total,
    weight, mean, rstd, seed. ``has``: whether there is a bias, and a delta_bias."""
    x, seed = saved[0], saved[4]
    # Without dropout and with equal dtypes, x and delta share one gradient tensor.
    apart = delta_dtype is not None and (seed is not None or delta_dtype != x.dtype)
    dy = torch.zeros_like(x) if dy is None else dy
    gradients = bwd(dy, dtotal, *saved, *dropout, delta_dtype if apart else None, *has)
    dx, ddelta, *rest = fill_none(gradients, True, apart, True, *has)
    return dx, ddelta if apart or delta_dtype is None else dx, *rest


def _backward(ctx, dy, dtotal, _dmean, _drstd):
    if ctx.delta_dtype is None:
        dtotal = None
    if dy is None and dtotal is None:
        return ()
    return norm_gradients(
        _layer_norm_bwd_op, dy, dtotal, ctx.saved_tensors, ctx.dropout, ctx.delta_dtype, *ctx.has
    )


differentiable(_layer_norm_op, _backward, _setup_context)


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
        A contiguous tensor with the shape and dtype of x. Under autocast it has autocast's dtype,
        which saves the Linear that follows a separate cast. Statistics and sums are float32.

    Raises:
        TypeError: x, weight or bias is not a floating-point tensor, or has an unsupported dtype.
        ValueError: shapes, dtypes or devices do not match, N > 16,384, or eps < 0.
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
    dropout_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """``total = residual + dropout(delta + delta_bias)``, and its LayerNorm (Ba et al. 2016,
    arXiv:1607.06450), in one pass forward and one backward.

    Args:
        residual: (..., N), any strides, N up to 16,384; float32, float16 or bfloat16, on a CUDA
            device.
        delta: shape of residual, any strides; of residual's dtype, or float16 or bfloat16.
        weight: (N,), of delta's dtype or float32.
        bias: (N,), of weight's dtype, or None.
        eps: added to the variance, at least 0.
        delta_bias: (N,), of weight's dtype, or None. Added to delta before dropout: the bias of the
            projection that computes delta.
        dropout_p: dropout probability of delta, from 0 to 0.999, rounded to a multiple of 2^-16.
        seed: int64 tensor with one element on residual's device: the Philox key of the dropout
            mask. The mask depends only on seed, dropout_offset and position (it is
            ``reference.dropout_mask`` of shape (M, N), rows flattened). If None, each call draws a
            seed from PyTorch's generator for the device.
        dropout_offset: selects one of the seed's independent masks, from 0 to 2^31 - 1.

    Returns:
        (y, total), contiguous, with the shape of residual. total has residual's dtype. y is the
        LayerNorm of the rounded total and has delta's dtype, or autocast's under autocast.
        Statistics and sums are float32.

    Raises:
        TypeError: an argument is not a floating-point tensor, or has an unsupported dtype.
        ValueError: shapes, dtypes or devices do not match, N > 16,384, or an argument is out of
            range.
    """
    _checks.residual_layer_norm(
        residual, delta, weight, bias, eps, delta_bias, dropout_p, seed, dropout_offset
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
        dropout_offset,
        _host.autocast_dtype(delta),
    )
    return y, total
