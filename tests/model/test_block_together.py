"""A block as one autograd node (``kernels/block.py``) equals its ops called one by one, bit for
bit. Ops are called one by one under hooks and modes, and where only some gradients are needed."""

import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import GPT
from fastgpt.blocks import MLP, CausalSelfAttention, Context, Dropout, LayerNorm
from fastgpt.kernels import block, fused, torch_ops
from tests.tools.small_models import model_with, small_config, tokens

N_LAYER = 2
EOT = int(tokens(1, 8)[0, 4])  # a separator within the sequence


@pytest.fixture
def fused_blocks(monkeypatch) -> list[int]:
    """A list that gets one element for each block computed as one node."""
    calls: list[int] = []
    real = block.block

    def counted(*args: Any) -> Any:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(block, "block", counted)
    return calls


def loss_and_gradients(model: GPT, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(2)  # dropout
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(tokens(1, 8), tokens(1, 8, seed=3))[1]
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters()]


def assert_equal(a: tuple[Tensor, list[Any]], b: tuple[Tensor, list[Any]]) -> None:
    assert torch.equal(a[0], b[0])
    for ours, theirs in zip(a[1], b[1], strict=True):
        assert torch.equal(ours, theirs) if theirs is not None else ours is None


@pytest.mark.parametrize(
    ("dtype", "options", "changes"),
    [
        (torch.bfloat16, {}, {}),
        (torch.bfloat16, dict(recompute=True, gelu="tanh"), dict(dropout=0.1, bias=False)),
        (torch.float32, dict(recompute=True, eot_token=EOT), dict(dropout=0.2)),
        (torch.float16, dict(eot_token=EOT), dict(dropout=0.1)),
    ],
)
def test_the_numbers_are_those_of_the_ops(fused_blocks, dtype, options, changes):
    model = model_with(fused, small_config(**changes), **options)
    together = loss_and_gradients(model, dtype)
    assert len(fused_blocks) == N_LAYER
    with mock.patch.object(block, "fits", lambda *_: False):
        one_by_one = loss_and_gradients(model, dtype)
    assert len(fused_blocks) == N_LAYER
    assert_equal(together, one_by_one)


def test_a_block_whose_last_norm_is_not_asked_for(fused_blocks):
    """Only the residual stream after the block is used, or only its norm."""
    model = model_with(fused, small_config(n_layer=1))
    layer: Any = model.transformer.h[0]
    last_norm, context = model.transformer.ln_f, Context(Dropout(None))
    for which in (0, 1):
        found = []
        for fits in (block.fits, lambda *_: False):
            model.zero_grad()
            residual = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(0))
            residual.requires_grad_()
            with mock.patch.object(block, "fits", fits):
                outputs = layer(layer.ln_1(residual), residual, last_norm, context, None)
            outputs[which].square().sum().backward()
            found.append((residual.grad, [p.grad for p in layer.parameters()]))
        assert_equal(*found)
    assert len(fused_blocks) == 2


def frozen(model: Any) -> None:
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)


def hooked(model: Any) -> None:
    model.transformer.h[0].mlp.c_fc.register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    model.transformer.h[0].mlp.gelu = nn.GELU("none")
    model.transformer.h[0].attn.c_proj = nn.Sequential(model.transformer.h[0].attn.c_proj)


def wider(model: Any) -> None:
    """An MLP of another width is still plain."""
    mlp = model.transformer.h[0].mlp
    mlp.c_fc, mlp.c_proj = nn.Linear(32, 48), nn.Linear(48, 32)


def shared(model: Any) -> None:
    """The sum of three gradients depends on their order."""
    first, second = model.transformer.h
    first.ln_2.weight = second.ln_1.weight = second.ln_2.weight


def one_bias(model: Any) -> None:
    model.transformer.h[0].mlp.c_fc.bias = None


def low_precision_bias(model: Any) -> None:
    bias = model.transformer.h[0].attn.c_proj.bias
    bias.data = bias.data.bfloat16()


def rounded(model: Any) -> None:
    """bfloat16 weights over a float32 residual stream."""
    for p in model.low_precision_parameters():
        p.data = p.data.bfloat16()


def first_of_the_users(model: Any) -> None:
    model.transformer.h[0] = nn.Linear(32, 32)


def last_of_the_users(model: Any) -> None:
    """The block before has no LayerNorm of ours to end with."""
    model.transformer.h[1] = nn.Linear(32, 32)


@pytest.mark.parametrize(
    ("change", "n"),
    [
        (frozen, 1),
        (hooked, 1),
        (replaced, 1),
        (wider, 2),
        (one_bias, 1),
        (low_precision_bias, 1),
        (shared, 1),
        (rounded, 2),
        (first_of_the_users, 1),
        (last_of_the_users, 0),
    ],
)
def test_a_changed_layer(fused_blocks, change: Callable[[GPT], None], n: int):
    model = model_with(fused, small_config(dropout=0.1))
    change(model)
    together = loss_and_gradients(model, torch.bfloat16)
    assert len(fused_blocks) == n
    with mock.patch.object(block, "fits", lambda *_: False):
        assert_equal(together, loss_and_gradients(model, torch.bfloat16))


def test_what_looks_into_the_model_sees_the_ops(fused_blocks):
    model = model_with(fused, small_config())
    idx = tokens(1, 8)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    assert any("linear" in str(op) for op in counter.get_flop_counts()["Global"])
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, weights, (idx, idx))[1]
        return found

    torch.func.grad(loss)({name: w.detach() for name, w in weights.items()})
    with torch.no_grad():
        model(idx, idx)
    assert not fused_blocks
    model.eval()(idx, idx)[1].backward()
    assert len(fused_blocks) == N_LAYER


def test_layers_on_other_ops_are_computed_by_them(fused_blocks):
    """Also if a single op of the namespace, or the ops of a single layer, differ."""
    calls = []

    def linear(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return fused.linear(*args, **kwargs)

    ops: Any = SimpleNamespace(**{**vars(fused), "linear": linear})
    loss_and_gradients(model_with(ops, small_config()), torch.float32)
    assert len(calls) == 2 * N_LAYER and not fused_blocks
    for change in (
        lambda layer: setattr(layer, "attn", CausalSelfAttention(small_config(), torch_ops)),
        lambda layer: setattr(layer, "ln_2", LayerNorm(32, False, torch_ops)),
        lambda layer: setattr(layer, "mlp", MLP(small_config(), torch_ops)),
    ):
        model: Any = model_with(fused, small_config())
        change(model.transformer.h[0])
        loss_and_gradients(model, torch.float32)
        assert len(fused_blocks) == 1
        fused_blocks.clear()


def test_a_model_on_other_ops_is_pickled_too():
    model = model_with(torch_ops, small_config())
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(tokens(1, 8))[0], model(tokens(1, 8))[0])


def test_a_second_derivative_is_refused_as_an_op_refuses_it():
    model: Any = model_with(fused, small_config())
    weight = model.transformer.h[0].attn.c_proj.weight
    loss = model(tokens(1, 8), tokens(1, 8))[1]
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: a kernel computes"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("layer", "name", "value", "message"),
    [
        ("mlp", "c_fc", nn.Linear(24, 128), r"fc_weight must have shape \(N, K\)"),
        ("mlp.dropout", "p", 1.0, r"dropout_p must lie in \[0, 0.999\], got 1.0"),
        ("mlp.dropout", "p", -0.1, r"dropout_p must lie in \[0, 0.999\], got -0.1"),
        ("attn", "dropout", float("nan"), r"dropout_p must lie in \[0, 0.999\], got nan"),
        ("mlp.gelu", "approximate", "erf", "approximate must be 'none' or 'tanh', got 'erf'"),
    ],
)
def test_what_is_wrong_is_refused_as_the_op_refuses_it(layer, name, value, message):
    model: Any = model_with(fused, small_config(dropout=0.1))
    setattr(model.transformer.h[0].get_submodule(layer), name, value)
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 8), tokens(1, 8))


def test_a_backward_under_another_autocast(fused_blocks):
    model = model_with(fused, small_config())
    found = []
    for fits in (block.fits, lambda *_: False):
        model.zero_grad()
        with mock.patch.object(block, "fits", fits):
            loss = model(tokens(1, 8), tokens(1, 8))[1]
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        found.append((loss, [p.grad for p in model.parameters()]))
    assert len(fused_blocks) == N_LAYER
    assert_equal(*found)


def test_a_mode_of_the_backward_alone_sees_the_ops(fused_blocks):
    model = model_with(fused, small_config(n_layer=1))
    found = []
    for fits in (block.fits, lambda *_: False):
        with mock.patch.object(block, "fits", fits):
            loss = model(tokens(1, 8), tokens(1, 8))[1]
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        found.append(counter.get_total_flops())
    assert len(fused_blocks) == 1
    assert found[0] == found[1] > 0


def test_checkpoints(fused_blocks):
    """Both passes of a checkpoint save the same tensors, even if only one runs under a mode."""
    model = model_with(fused, small_config(n_layer=1))
    plain = loss_and_gradients(model, torch.float32)
    layer: Any = model.transformer.h[0]
    between = layer.between_norms
    layer.between_norms = lambda *a: checkpoint(between, *a, use_reentrant=False)
    assert_equal(loss_and_gradients(model, torch.float32), plain)
    with FlopCounterMode(display=False):
        loss = model(tokens(1, 8), tokens(1, 8, seed=3))[1]
    model.zero_grad()
    loss.backward()
    assert_equal((loss, [p.grad for p in model.parameters()]), plain)
    assert len(fused_blocks) == 1  # in the plain run


def test_a_result_that_the_backward_needs_may_not_change(fused_blocks):
    model = model_with(fused, small_config(n_layer=1))
    layer: Any = model.transformer.h[0]
    residual = torch.randn(2, 8, 32)
    norm, total = layer(
        layer.ln_1(residual), residual, model.transformer.ln_f, Context(Dropout(None)), None
    )
    total.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        norm.sum().backward()
    assert len(fused_blocks) == 1
