"""LayerNorm (Ba et al. 2016): operator and public function.

The equations, what is saved, bytes and FLOPs stand in ``layer_norm_kernels.py``.
"""

import torch
from torch import Tensor

from fastgpt.kernels import _checks, _common
from fastgpt.kernels.layer_norm_kernels import MAX_WIDTH, backward, forward, statistic


@torch.library.custom_op("fastgpt::layer_norm", mutates_args=())
def _layer_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y with the shape of x, contiguous; mean and rstd (M)."""
    y, _, mean, rstd = forward(x, None, weight, bias, None, None, eps, 0.0, 0, out_dtype)
    return y, mean, rstd


def _gradients(x: Tensor, weight: Tensor, has_bias: bool) -> list[Tensor]:
    """Memory for dx, dweight and, if there is a bias, dbias."""
    params = [weight.new_empty(weight.shape) for _ in range(1 + has_bias)]
    return [x.new_empty(x.shape), *params]


@torch.library.custom_op("fastgpt::layer_norm_bwd", mutates_args=())
def _layer_norm_bwd_op(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, has_bias: bool
) -> list[Tensor]:
    dx, dweight, *dbias = gradients = _gradients(x, weight, has_bias)
    backward(
        dy, None, x, weight, mean, rstd, None, 0.0, 0,
        dx, None, dweight, dbias[0] if has_bias else None, None,
    )  # fmt: skip
    return gradients


@_layer_norm_op.register_fake
def _(x, weight, bias, eps, out_dtype):
    mean = x.new_empty(x.numel() // x.shape[-1], dtype=statistic(x))
    return x.new_empty(x.shape, dtype=out_dtype), mean, torch.empty_like(mean)


@_layer_norm_bwd_op.register_fake
def _(dy, x, weight, mean, rstd, has_bias):
    return _gradients(x, weight, has_bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.has_bias = bias is not None
    ctx.set_materialize_grads(False)  # no zeros for mean and rstd


def _backward(ctx, dy, _dmean, _drstd):
    if dy is None:
        return (*[None] * 5,)
    dx, dweight, *dbias = _layer_norm_bwd_op(dy, *ctx.saved_tensors, ctx.has_bias)
    return dx, dweight, dbias[0] if ctx.has_bias else None, None, None


_layer_norm_op.register_autograd(_backward, setup_context=_setup_context)


def check_width(name: str, x: Tensor) -> None:
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
    _common.launchable(x=x, weight=weight, bias=bias)
    check_width("x", x)
    return _layer_norm_op(x, weight, bias, eps, _common.autocast_dtype(x))[0]
