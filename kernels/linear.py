"""Linear layer: ``y = x weightᵀ + bias``, forward and backward.

x is (T, K) after flattening, weight (N, K), bias (N), y (T, N). cuBLAS computes ``x weightᵀ`` and
``dx = dy weight``, which have no epilogue left to fuse. The Triton kernel of ``gemm.py`` computes
``dweight = dyᵀ x`` and ``dbias``, the sum of dy, in one pass, both summed in float32 and rounded
once. Saved for backward: x and weight.

A mixed-precision model keeps float32 weights. They are cast to x's dtype before the product, and
dweight is returned as float32 without an intermediate half-precision gradient.

Bytes moved at s bytes per element: s (T K + N K + T N) for each of the three products. Their
2 T K N FLOPs hide this if K and N are in the hundreds.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import _checks, _host, gemm
from fastgpt.kernels._operators import differentiable, fake, fill_none, operator
from fastgpt.kernels._tensors import as_matrix
from fastgpt.kernels.layer_norm_fwd import layer_norm_fwd


def rows(x: Tensor) -> Tensor:
    """(..., N) → (T, N) with adjacent columns. Copied only if no such view exists, or if rows
    overlap (an expanded gradient), which a tensor descriptor cannot express."""
    x = as_matrix(x)
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return x
    # contiguous() would return a single element unchanged, with any strides
    return x.clone(memory_format=torch.contiguous_format)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype of the product, contiguous."""
    return weight.to(dtype).contiguous()


def saved_for_recompute(
    x: Tensor, source: Tensor | None, ln_weight: Tensor | None, ln_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The tensors saved for a layer's input: x, or the arguments from which to recompute it."""
    return (x, None, None) if source is None else (source, ln_weight, ln_bias)


def recomputed(
    saved: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    if ln_weight is None:
        return saved
    return layer_norm_fwd(saved, None, ln_weight, ln_bias, None, None, eps, 0.0, 0, dtype)[0]


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    source: Tensor | None,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(rows(x), cast(weight, x.dtype), bias).view(*x.shape[:-1], weight.shape[0])


_linear_op = operator("linear")(linear_fwd)


@fake(_linear_op)
def _(x, weight, bias, source, ln_weight, ln_bias, eps):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def linear_bwd(
    dy: Tensor,
    weight: Tensor,
    saved: Tensor,
    ln_weight: Tensor | None,
    ln_bias: Tensor | None,
    eps: float,
    has_bias: bool,
    wants_dx: bool,
    wants_dweight: bool,
) -> list[Tensor]:
    """The wanted ones of: dx; dweight, with dbias if there is a bias."""
    gradients = []
    dy_rows = rows(dy)
    if wants_dx:
        dx = dy_rows @ cast(weight, dy.dtype)
        gradients.append(dx.view(saved.shape))
    if wants_dweight:
        x = recomputed(saved, ln_weight, ln_bias, eps, dy.dtype)
        dweight, dbias = gemm.weight_gradient(dy_rows, rows(x), has_bias, weight.dtype)
        gradients += [dweight] if dbias is None else [dweight, dbias]
    return gradients


_linear_bwd_op = operator("linear_bwd")(linear_bwd)


@fake(_linear_bwd_op)
def _(dy, weight, saved, ln_weight, ln_bias, eps, has_bias, wants_dx, wants_dweight):
    gradients = [dy.new_empty(saved.shape)] if wants_dx else []
    if wants_dweight:
        gradients.append(weight.new_empty(weight.shape))
        gradients += [weight.new_empty(weight.shape[0])] if has_bias else []
    return gradients


def _setup_context(ctx, inputs, output):
    x, weight, bias, *norm_arguments, ctx.eps = inputs
    ctx.save_for_backward(weight, *saved_for_recompute(x, *norm_arguments))
    ctx.has_bias = bias is not None


def _backward(ctx, dy):
    wants_dx, wants_dweight, wants_dbias, *_ = ctx.needs_input_grad
    wanted = wants_dx, wants_dweight or wants_dbias
    gradients = _linear_bwd_op(dy, *ctx.saved_tensors, ctx.eps, ctx.has_bias, *wanted)
    return fill_none(gradients, *wanted, wanted[1] and ctx.has_bias)


differentiable(_linear_op, _backward, _setup_context)


def with_recompute(
    recompute: _checks.Recompute | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
    """The operators' arguments for ``recompute``: detached, since gradients flow only through x."""
    if recompute is None:
        return None, None, None, 0.0
    source, weight, bias, eps = recompute
    return source.detach(), weight.detach(), None if bias is None else bias.detach(), eps


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    recompute: _checks.Recompute | None = None,
) -> Tensor:
    """A linear layer like ``F.linear``, with gradients summed in float32 and rounded once.

    Args:
        x: (..., K), any strides; float32, float16 or bfloat16, on a CUDA device. Cast to
            autocast's dtype under autocast.
        weight: (N, K), of x's dtype or float32; rounded to x's dtype.
        bias: (N,), of weight's dtype, or None.
        recompute: ``(x, weight, bias, eps)`` of the ``layer_norm`` that computed x. Its input is
            saved anyway, so x is not saved but recomputed in the backward.

    Returns:
        (..., N) of x's dtype, contiguous.

    Raises:
        TypeError: x, weight or bias is not a floating-point tensor, or has an unsupported dtype.
        ValueError: shapes, dtypes or devices do not match.
    """
    _checks.floating(x=x)
    x = x.to(_host.autocast_dtype(x))
    _checks.linear(x, weight, bias, recompute)
    _host.launchable(x=x, weight=weight, bias=bias)
    return _linear_op(x, weight, bias, *with_recompute(recompute))
