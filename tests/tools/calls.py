"""Every op with a gradient, called with some of its options, for tests of what holds for all."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Call(NamedTuple):
    """An op with some of its options. ``shapes``: of the tensors that get a gradient."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Tensor | tuple[Tensor, ...]]


def _linear_of_norm(ops, x: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
    y = ops.layer_norm(x, norm)
    return ops.linear(y, weight, recompute=(x, norm, None, 1e-5))


def _mlp_of_norm(ops, x: Tensor, norm: Tensor, fc: Tensor, proj: Tensor) -> Tensor:
    y = ops.layer_norm(x, norm)
    return ops.mlp(y, fc, None, proj, recompute=(x, norm, None, 1e-5))


def _embedding(ops, token: Tensor, position: Tensor, dropout_p: float) -> Tensor:
    idx = torch.arange(12, device=token.device).view(2, 6) % 5
    return ops.embedding(idx, token, position, dropout_p=dropout_p)


def _linear_cross_entropy(ops, x: Tensor, weight: Tensor) -> Tensor:
    targets = torch.arange(len(x), device=x.device)
    return ops.linear_cross_entropy(x, weight, targets)


def _residual_layer_norm(ops, *tensors: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    residual, delta, weight, bias, delta_bias = tensors
    return ops.residual_layer_norm(
        residual, delta, weight, bias, delta_bias=delta_bias, dropout_p=dropout_p
    )


_NORMALISED = ((2, 5, 33), (2, 5, 33), (33,), (33,), (33,))
_HEADS = ((2, 1, 9, 16),) * 3
CALLS = {
    "gelu": Call("gelu", ((5, 33),), lambda ops, x: ops.gelu(x)),
    "layer_norm": Call(
        "layer_norm", ((2, 5, 33), (33,), (33,)), lambda ops, *tensors: ops.layer_norm(*tensors)
    ),
    "residual_layer_norm": Call(
        "residual_layer_norm", _NORMALISED, partial(_residual_layer_norm, dropout_p=0.0)
    ),
    "residual_layer_norm, dropout": Call(
        "residual_layer_norm", _NORMALISED, partial(_residual_layer_norm, dropout_p=0.5)
    ),
    "linear": Call(
        "linear", ((2, 7, 20), (11, 20), (11,)), lambda ops, *tensors: ops.linear(*tensors)
    ),
    "linear, recompute": Call("linear", ((7, 20), (20,), (11, 20)), _linear_of_norm),
    "mlp": Call(
        "mlp", ((2, 7, 20), (24, 20), (24,), (16, 24)), lambda ops, *tensors: ops.mlp(*tensors)
    ),
    "mlp, recompute": Call("mlp", ((7, 20), (20,), (24, 20), (16, 24)), _mlp_of_norm),
    "attention": Call("attention", _HEADS, lambda ops, *tensors: ops.attention(*tensors)),
    "attention, dropout": Call(
        "attention", _HEADS, lambda ops, *tensors: ops.attention(*tensors, dropout_p=0.5)
    ),
    "attention, odd head": Call(
        "attention", ((2, 2, 9, 15),) * 3, lambda ops, *tensors: ops.attention(*tensors)
    ),
    "attention_qkvpacked": Call(
        "attention_qkvpacked", ((2, 9, 96),), lambda ops, qkv: ops.attention_qkvpacked(qkv, 2)
    ),
    "attention_qkvpacked, odd head": Call(
        "attention_qkvpacked", ((2, 9, 45),), lambda ops, qkv: ops.attention_qkvpacked(qkv, 1)
    ),
    "embedding": Call("embedding", ((5, 33), (6, 33)), partial(_embedding, dropout_p=0.0)),
    "embedding, dropout": Call("embedding", ((5, 33), (6, 33)), partial(_embedding, dropout_p=0.5)),
    "linear_cross_entropy": Call(
        "linear_cross_entropy", ((5, 20), (17, 20)), _linear_cross_entropy
    ),
}


every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def tensors_of(call: Call, device: str, *batch: int) -> list[Tensor]:
    return [torch.randn(*batch, *s, device=device, requires_grad=True) for s in call.shapes]


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def gradients_of(out: tuple[Tensor, ...], tensors: list[Tensor]) -> list[Tensor]:
    grads = [torch.linspace(-1.0, 1.0, y.numel(), device=y.device).view_as(y) for y in out]
    torch.autograd.backward(out, grads)
    gradients = []
    for x in tensors:
        assert x.grad is not None
        gradients.append(x.grad)
        x.grad = None
    return gradients


def decoding(cache: Tensor, positions: Tensor) -> Callable[..., Tensor]:
    """A call of ``attention_decode`` with qkv alone: the result and the cache that it leaves."""

    def call(ops, qkv: Tensor) -> Tensor:
        mine = cache.to(qkv.dtype, copy=True)
        out = ops.attention_decode(qkv.detach(), mine, positions)
        return torch.cat((out.flatten(), mine.flatten()))

    return call
