"""What holds for every op: checkpointing, and what else autograd's users do with its results."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastgpt.kernels import reference

WITHOUT_GRADIENT = {"adamw", "attention_decode"}


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


_NORMALISED = ((5, 33), (5, 33), (33,), (33,), (33,))
_HEADS = ((2, 1, 9, 16),) * 3
CALLS = {
    "gelu": Call("gelu", ((5, 33),), lambda ops, x: ops.gelu(x)),
    "layer_norm": Call(
        "layer_norm", ((5, 33), (33,), (33,)), lambda ops, *tensors: ops.layer_norm(*tensors)
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


def test_every_op_with_a_gradient_is_called() -> None:
    assert {call.op for call in CALLS.values()} == set(reference.OPS) - WITHOUT_GRADIENT


every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def _tensors(call: Call, device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device, requires_grad=True) for shape in call.shapes]


def _as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def _gradients(out: tuple[Tensor, ...], tensors: list[Tensor]) -> list[Tensor]:
    grads = [torch.linspace(-1.0, 1.0, y.numel(), device=y.device).view_as(y) for y in out]
    torch.autograd.backward(out, grads)
    gradients = [x.grad for x in tensors]
    for x in tensors:
        x.grad = None
    assert all(gradient is not None for gradient in gradients)
    return gradients


# ----------------------------------------------------------------------------- checkpointing


_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}


def _expensive_saved(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
    if op.namespace == "fastgpt" or op.overloadpacket in _PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _all_recomputed(*_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


def _selective(policy: Callable) -> Callable:
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


CHECKPOINTS = {
    "without re-entry": partial(checkpoint, use_reentrant=False),
    "re-entrant": partial(checkpoint, use_reentrant=True),
    "selective, operators saved": _selective(_expensive_saved),
    "selective, all recomputed": _selective(_all_recomputed),
}


@every_call
@pytest.mark.parametrize("kind", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpointing_changes_no_bit(ops, device: str, kind: Callable, call: Call) -> None:
    tensors = _tensors(call, device)
    outcomes = []
    for run in (lambda f, *args: f(*args), kind):
        torch.manual_seed(1)
        out = _as_tuple(run(lambda *args: call.run(ops, *args), *tensors))
        outcomes.append([*(y.detach().clone() for y in out), *_gradients(out, tensors)])
    assert all(torch.equal(x, y) for x, y in zip(*outcomes, strict=True))


# ----------------------------------------------------------------------- in-place changes

# What a backward needs of its own results; SDPA's needs its own too.
_NEEDED = {("attention", 0), ("attention_qkvpacked", 0), ("residual_layer_norm", 1)}


@every_call
def test_results_may_be_changed_in_place(ops, device: str, call: Call) -> None:
    """The gradient is that of a change that is not in place; or, where the backward needs the
    result, PyTorch says so."""
    tensors = _tensors(call, device)
    n_outputs = len(_as_tuple(call.run(ops, *tensors)))
    for k in range(n_outputs):
        torch.manual_seed(1)
        out = list(_as_tuple(call.run(ops, *tensors)))
        out[k] = out[k] * 2.0 + 1.0
        expected = _gradients(tuple(out), tensors)
        torch.manual_seed(1)
        out = list(_as_tuple(call.run(ops, *tensors)))
        out[k].mul_(2.0).add_(1.0)
        try:
            gradients = _gradients(tuple(out), tensors)
        except RuntimeError as error:
            assert (call.op, k) in _NEEDED
            assert "modified by an inplace operation" in str(error)
        else:
            assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))
