"""One training step of the whole model: tied and frozen weights, one dropout seed for all ops,
recomputation.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastgpt import GPT
from fastgpt.kernels import fused, reference
from tests.tools import parity
from tests.tools.small_models import BLOCK, model_with, small_config, tokens

# The plain ops with the kernels' dropout masks.
SEEDED = SimpleNamespace(**{**vars(reference), "dropout_seed": fused.dropout_seed})


def step(model: GPT, device: str) -> dict[str, Tensor]:
    """The loss and all gradients that exist."""
    torch.manual_seed(3)  # dropout
    loss = model(tokens(3, BLOCK).to(device), tokens(3, BLOCK, seed=2).to(device))[1]
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_close(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> None:
    assert ours.keys() == plain.keys()
    far = {k: (ours[k] - plain[k]).abs().max().item() for k in ours}
    assert max(far.values()) <= 1e-5, far


def test_the_tied_weight_gets_both_gradients(ops, device: str) -> None:
    """The gradients of an untied embedding and head add up to that of the tied weight."""
    together = step(model_with(ops, small_config(), device), device)
    model = model_with(ops, small_config(), device)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    apart = step(model, device)
    embedding, head = apart["transformer.wte.weight"], apart["lm_head.weight"]
    assert embedding.abs().max() > 1e-4 and head.abs().max() > 1e-4
    difference = together["transformer.wte.weight"] - (embedding + head)
    assert difference.abs().max() <= 1e-6


@pytest.mark.parametrize(
    "frozen", ["wte", "wpe", "ln_", "attn", "mlp.c_fc", "mlp.c_proj", "bias", "h.0"]
)
def test_frozen_parameters(ops, device: str, frozen: str) -> None:
    results, n_layer = [], 2 if frozen == "h.0" else 1
    for which in (ops, reference):
        model = model_with(which, small_config(bias=True, n_layer=n_layer), device)
        for name, param in model.named_parameters():
            param.requires_grad_(frozen not in name)
        results.append(step(model, device))
    assert not any(frozen in name for name in results[0])
    assert_close(*results)


def test_one_seed_draws_every_mask(device: str) -> None:
    """With dropout, forward and backward equal the plain ops' with the same seed's masks."""
    results = [
        step(model_with(which, small_config(bias=True, dropout=0.3), device), device)
        for which in (fused, SEEDED)
    ]
    assert_close(*results)
    plain = step(model_with(SEEDED, small_config(bias=True), device), device)
    assert (results[0]["loss"] - plain["loss"]).abs() > 1e-4  # dropout is active


def test_every_place_has_a_mask_of_its_own(device: str) -> None:
    streams: list[int] = []

    def noted(op):
        def call(*args, dropout_p: float, seed: Tensor | None, dropout_offset: int, **kwargs):
            assert dropout_p == 0.3 and seed is not None
            streams.append(dropout_offset)
            return op(
                *args, dropout_p=dropout_p, seed=seed, dropout_offset=dropout_offset, **kwargs
            )

        return call

    names = ("embedding", "attention_qkvpacked", "residual_layer_norm")
    ops = SimpleNamespace(**{**vars(fused), **{n: noted(getattr(fused, n)) for n in names}})
    config = small_config(dropout=0.3)
    step(model_with(ops, config, device), device)
    assert sorted(streams) == list(range(1 + 3 * config.n_layer))


@pytest.mark.parametrize(
    "bias, dropout, autocast, gelu",
    [(True, 0.0, False, "none"), (False, 0.3, False, "tanh"), (False, 0.0, True, "none")],
)
def test_recomputing_changes_no_bit(
    ops, device: str, bias: bool, dropout: float, autocast: bool, gelu: str
) -> None:
    config = small_config(bias=bias, dropout=dropout)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        kept, again = (
            step(model_with(ops, config, device, recompute=recompute, gelu=gelu), device)
            for recompute in (False, True)
        )
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def saved_bytes(model: GPT, device: str) -> int:
    """Bytes that autograd saves for backward besides the parameters, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    x = tokens(3, BLOCK).to(device)
    kept = parity.saved_storages(lambda: model(x, x)[1])
    return sum(size for place, size in kept.items() if place not in parameters)


def test_recomputing_keeps_less(ops, device: str) -> None:
    """Per layer and token it drops two normalised inputs (C each) and GELU's output (4C)."""
    config = small_config(n_layer=4)
    kept, again = (
        saved_bytes(model_with(ops, config, device, recompute=recompute), device)
        for recompute in (False, True)
    )
    assert kept - again == config.n_layer * 6 * config.n_embd * 3 * BLOCK * 4
