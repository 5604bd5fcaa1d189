"""What holds for every op at its edges: checkpointing, changes in place, sizes of 0, expanded
gradients, memory layouts, second derivatives."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.kernels import _host, fused, reference, torch_ops
from fastgpt.kernels.linear import rows

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
    gradients = []
    for x in tensors:
        assert x.grad is not None
        gradients.append(x.grad)
        x.grad = None
    return gradients


def _assert_same(ops, got: list[Tensor], expected: list[Tensor]) -> None:
    """To the bit, but for PyTorch's kernels on a GPU, some of which add up in any order."""
    tolerance = None if ops is torch_ops and got[0].is_cuda else 0.0  # None: the default
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


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
def test_checkpointing_changes_no_number(ops, device: str, kind: Callable, call: Call) -> None:
    tensors = _tensors(call, device)
    outcomes = []
    for run in (lambda f, *args: f(*args), kind):
        torch.manual_seed(1)
        out = _as_tuple(run(lambda *args: call.run(ops, *args), *tensors))
        outcomes.append([*(y.detach().clone() for y in out), *_gradients(out, tensors)])
    _assert_same(ops, *outcomes)


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
            _assert_same(ops, gradients, expected)


# ------------------------------------------------------------------------- nothing to compute


# Shapes for ``CALLS`` with a size of 0: every op without rows, and products whose inner or outer
# size is 0. LayerNorm over no columns and attention without keys are refused.
EMPTY: dict[str, list[list[tuple[int, ...]]]] = {
    "gelu": [[(0, 33)], [(5, 0)], [(0,)]],
    "layer_norm": [[(0, 33), (33,), (33,)], [(2, 0, 33), (33,), (33,)]],
    "residual_layer_norm": [[(0, 33), (0, 33), (33,), (33,), (33,)]],
    "residual_layer_norm, dropout": [[(0, 33), (0, 33), (33,), (33,), (33,)]],
    "linear": [
        [(0, 2, 20), (11, 20), (11,)],
        [(3, 0), (5, 0), (5,)],
        [(0,), (5, 0), (5,)],
        [(0, 0), (5, 0), (5,)],
        [(3, 20), (0, 20), (0,)],
        [(2, 0, 0), (0, 0), (0,)],
    ],
    "linear, recompute": [
        [(0, 20), (20,), (11, 20)],
        [(3, 20), (20,), (0, 20)],
        [(0, 20), (20,), (0, 20)],
    ],
    "mlp": [
        [(0, 2, 20), (24, 20), (24,), (16, 24)],
        [(3, 0), (24, 0), (24,), (16, 24)],
        [(3, 20), (0, 20), (0,), (16, 0)],
        [(3, 20), (24, 20), (24,), (0, 24)],
        [(0,), (0, 0), (0,), (0, 0)],
    ],
    "mlp, recompute": [
        [(0, 20), (20,), (24, 20), (16, 24)],
        [(3, 20), (20,), (0, 20), (16, 0)],
        [(3, 20), (20,), (24, 20), (0, 24)],
    ],
    "attention": [[(0, 2, 9, 16)] * 3, [(2, 0, 9, 16)] * 3, [(2, 2, 0, 16), *[(2, 2, 9, 16)] * 2]],
    "attention, dropout": [[(0, 2, 9, 16)] * 3],
    "attention, odd head": [[(0, 2, 9, 15)] * 3],
    "attention_qkvpacked": [[(0, 9, 96)]],
    "attention_qkvpacked, odd head": [[(0, 9, 45)]],
    "linear_cross_entropy": [[(0, 20), (17, 20)], [(5, 0), (17, 0)], [(0, 0), (17, 0)]],
}
_EMPTY = [(name, shapes) for name, cases in EMPTY.items() for shapes in cases]


def test_every_call_has_a_case_of_nothing() -> None:
    assert {*EMPTY} == {name for name, call in CALLS.items() if call.op != "embedding"}


@pytest.mark.parametrize(("name", "shapes"), _EMPTY, ids=str)
def test_nothing_to_compute(ops, device: str, name: str, shapes: list[tuple[int, ...]]) -> None:
    call, outcomes = CALLS[name], []
    leaves = [torch.randn(shape, device=device) for shape in shapes]
    for implementation in (reference, ops):
        tensors = [x.clone().requires_grad_() for x in leaves]
        with FlopCounterMode(display=False):
            out = _as_tuple(call.run(implementation, *tensors))
            outcomes.append([*(y.detach() for y in out), *_gradients(out, tensors)])
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5, equal_nan=True)
    with FakeTensorMode():
        tensors = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
        out = _as_tuple(call.run(ops, *tensors))
        fakes = [*out, *torch.autograd.grad(out, tensors, [torch.zeros_like(y) for y in out])]
    assert [x.shape for x in fakes] == [x.shape for x in outcomes[0]]


def test_products_of_nothing_are_pytorchs(device: str) -> None:
    """What the plain ops give, with which all others are compared."""
    for shapes in EMPTY["linear"]:
        tensors = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        expected, got = F.linear(*tensors), reference.linear(*tensors)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(_gradients((got,), tensors), _gradients((expected,), tensors))


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)])
@pytest.mark.parametrize("documents", [False, True])
def test_embedding_of_nothing(ops, device: str, shape: tuple[int, int], documents: bool) -> None:
    token, position = (torch.randn(n, 33, device=device, requires_grad=True) for n in (5, 6))
    idx = torch.zeros(shape, dtype=torch.int64, device=device)
    doc_start = idx.int() if documents else None
    out = ops.embedding(idx, token, position, dropout_p=0.5, doc_start=doc_start)
    assert out.shape == (*shape, 33)
    for gradient in torch.autograd.grad(out.sum(), (token, position)):
        assert not gradient.any()


def test_decoding_no_sequence(device: str) -> None:
    for ops in (reference, torch_ops, fused):
        cache = torch.zeros(2, 0, 2, 8, 16, device=device)
        positions = torch.zeros(0, dtype=torch.int64, device=device)
        out = ops.attention_decode(torch.zeros(0, 1, 96, device=device), cache, positions)
        assert out.shape == (0, 1, 32)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 2, 3, 5), (2, 0, 3, 5), (2, 2, 0, 5)])
def test_the_dropout_mask_of_nothing(shape: tuple[int, ...]) -> None:
    mask, _ = reference.dropout_mask(torch.tensor([1]), shape, 0.5)
    assert mask.shape == shape


# ------------------------------------------------------------------------- expanded gradients

# One row, one column: PyTorch calls such a tensor contiguous whatever its strides are.
SINGLE: dict[str, list[tuple[int, ...]]] = {
    "gelu": [(1, 1)],
    "layer_norm": [(1, 1), (1,), (1,)],
    "residual_layer_norm": [(1, 1), (1, 1), (1,), (1,), (1,)],
    "linear": [(1, 16), (1, 16), (1,)],
    "linear, recompute": [(1, 16), (16,), (1, 16)],
    "mlp": [(1, 16), (1, 16), (1,), (1, 1)],
    "mlp, recompute": [(1, 16), (16,), (16, 16), (1, 16)],
    "attention": [(1, 1, 1, 16)] * 3,
    "attention, odd head": [(1, 1, 1, 1)] * 3,
    "attention_qkvpacked": [(1, 1, 96)],
    "attention_qkvpacked, odd head": [(1, 1, 3)],
    "embedding": [(5, 1), (6, 1)],
    "linear_cross_entropy": [(1, 16), (1, 16)],
}


@pytest.mark.parametrize("single", [False, True], ids=["ragged", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SINGLE)
def test_expanded_gradients(device: str, name: str, dtype: torch.dtype, single: bool) -> None:
    """What ``y.sum().backward()`` hands down: one number with strides of 0."""
    call = CALLS[name]
    shapes = SINGLE[name] if single else call.shapes
    leaves = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    for launches in (None, 90) if device == "cpu" else (None,):
        with _host.interpreted(_host.INTERPRETED, launches):
            out = _as_tuple(call.run(fused, *leaves))
            expanded = [torch.ones((), dtype=y.dtype, device=device).expand(y.shape) for y in out]
            dense = [torch.ones(y.shape, dtype=y.dtype, device=device) for y in out]
            got = torch.autograd.grad(out, leaves, expanded, retain_graph=True)
            expected = torch.autograd.grad(out, leaves, dense)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (8, 1), (9, 24)], ids=str)
def test_rows_of_an_expanded_gradient_have_strides(shape: tuple[int, int]) -> None:
    """No descriptor takes a stride of 0, nor does every routine of a library."""
    assert rows(torch.ones(()).expand(shape)).stride() == (shape[1], 1)


# ----------------------------------------------------------------------------- memory layouts


@every_call
def test_results_are_contiguous(device: str, call: Call) -> None:
    """Of the Triton ops, whatever the strides of their arguments; ``attention`` in token order."""
    dense = _tensors(call, device)
    strided = [x.mT.contiguous().mT if x.dim() > 1 else x.repeat(2)[::2] for x in dense]
    for tensors in (dense, [x.detach().requires_grad_() for x in strided]):
        for y in _as_tuple(call.run(fused, *tensors)):
            if call.op == "attention":
                assert y.stride(3) == 1 and sorted(y.stride(), reverse=True) == [
                    y.stride(dim) for dim in (0, 2, 1, 3)
                ]
            else:
                assert y.is_contiguous()


@pytest.mark.parametrize("shape", [(2, 9, 45), (1, 9, 48), (9, 1, 45), (2, 9, 96)])
@pytest.mark.parametrize("ops", [reference, torch_ops, fused])
def test_packed_attention_is_contiguous(ops, device: str, shape: tuple[int, int, int]) -> None:
    assert ops.attention_qkvpacked(torch.randn(shape, device=device), 1).is_contiguous()


# ------------------------------------------------------------------------- second derivatives


def _second_derivatives(ops, call: Call, leaves: list[Tensor]) -> list[Tensor]:
    """Of all leaves' gradients, contracted with themselves."""
    torch.manual_seed(1)
    tensors = [x.clone().requires_grad_() for x in leaves]
    out = _as_tuple(call.run(ops, *tensors))
    grads = [torch.linspace(-1.0, 1.0, y.numel(), device=y.device).view_as(y) for y in out]
    grads = [grad.requires_grad_() for grad in grads]
    first = torch.autograd.grad(out, tensors, grads, create_graph=True)
    total = torch.stack([(x * x).sum() for x in first]).sum()
    return list(torch.autograd.grad(total, [*tensors, *grads], materialize_grads=True))


@every_call
def test_second_derivatives_are_right_or_refused(ops, device: str, call: Call) -> None:
    """No kernel has one, and every op says so in the same words; PyTorch's SDPA in its own."""
    leaves = [torch.randn(shape, device=device) for shape in call.shapes]
    if ops is fused or call.op == "linear_cross_entropy":
        names = f"({call.op.removeprefix('residual_')}|layer_norm)"
        message = f"^{names.replace('_qkvpacked', '(_qkvpacked)?')} has no second derivative: "
        with pytest.raises(RuntimeError, match=message):
            _second_derivatives(ops, call, leaves)
        return
    try:
        got = _second_derivatives(ops, call, leaves)
    except RuntimeError as error:
        assert "scaled_dot_product" in str(error) and "not implemented" in str(error)
    else:
        expected = _second_derivatives(reference, call, leaves)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
