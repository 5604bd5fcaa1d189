"""AdamW with master weights: parity with AdamW on a float32 model, and its state."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastgpt import GPT
from fastgpt.bigram import Bigram
from fastgpt.training.optimizer import MasterAdamW, saved_state
from tests.tools.small_models import small_config, small_model, tokens
from tests.tools.small_runs import assert_same

BETAS = (0.9, 0.95)


def optimizer_of(model: GPT, dtype: torch.dtype = torch.bfloat16) -> MasterAdamW:
    return MasterAdamW(model, dtype, 0.1, 1e-2, BETAS)


def backward(model: nn.Module, seed: int) -> Tensor:
    idx = tokens(seed=seed)
    loss = model(idx, idx.roll(-1, 1))[1]
    loss.backward()
    return loss.detach()


def test_what_is_held_in_which_dtype() -> None:
    model = small_model(bias=True)
    names = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in names.items()}
    optimizer = optimizer_of(model)
    assert dict(model.named_parameters()).keys() == names.keys()
    for name, p in model.named_parameters():
        assert p is names[name]  # parameters keep their identity, e.g. for a compiled model
        half = p.dim() == 2 or name.endswith(("c_attn.bias", "c_fc.bias"))
        assert p.dtype == (torch.bfloat16 if half else torch.float32), name
        assert torch.equal(p, before[name].to(p.dtype))
        assert p.data_ptr() % 16 == 0 and p.is_contiguous()
    assert model.lm_head.weight is model.transformer.wte.weight
    masters = optimizer.master_state_dict()
    assert list(masters) == list(model.state_dict())
    assert all(torch.equal(masters[name], value) for name, value in before.items())


def test_updates_are_those_of_adamw_on_the_master_weights() -> None:
    """Both get the same gradients; the model's weights are the rounded masters."""
    model, twin = small_model(bias=True), small_model(bias=True)
    ours = optimizer_of(model)
    plain = twin.configure_optimizers(0.1, 1e-2, BETAS, "cpu")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.register_hook(lambda g, q=q: setattr(q, "grad", g.float()))
    for seed in range(5):
        backward(model, seed)
        norm = ours.clip_grad_norm_(0.5)
        expected = nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        torch.testing.assert_close(norm, expected)
        ours.step()
        plain.step()
        ours.zero_grad()
        plain.zero_grad()
        masters = ours.master_state_dict()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(masters[name], q.detach(), rtol=1e-5, atol=1e-7)
            assert torch.equal(p, masters[name].to(p.dtype)), name


def test_gradients_of_several_passes_add_up_in_float32() -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    summed: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        p.register_hook(
            lambda g, name=name: summed.__setitem__(name, summed.get(name, 0) + g.double())
        )
    for seed in range(4):
        backward(model, seed)
        assert all(p.grad is None for p in model.parameters())
    total = torch.stack([g.square().sum() for g in summed.values()]).sum().sqrt()
    norm = optimizer.clip_grad_norm_(1.0)
    torch.testing.assert_close(norm.double(), total, rtol=1e-5, atol=0.0)


def test_gradients_of_one_parameter_add_up_while_others_have_none() -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    weight = model.lm_head.weight
    for scale in (1.0, 2.0, 4.0):
        (scale * weight.float()).sum().backward()
    norm = optimizer.clip_grad_norm_(1.0)
    torch.testing.assert_close(norm, torch.tensor(7.0 * math.sqrt(weight.numel())))


def test_a_parameter_without_a_gradient_is_only_decayed() -> None:
    model = small_model()
    optimizer = optimizer_of(model)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    before = optimizer.master_state_dict()["lm_head.weight"].clone()
    moment = optimizer.state_dict()["state"][0]["exp_avg"].clone()
    optimizer.step()  # no backward in between
    after = optimizer.state_dict()["state"][0]
    torch.testing.assert_close(after["exp_avg"], 0.9 * moment)
    assert after["step"].item() == 2
    assert not torch.equal(optimizer.master_state_dict()["lm_head.weight"], before)


@pytest.mark.parametrize("bias", [False, True])
def test_state_goes_both_ways(bias: bool) -> None:
    """Between this class and AdamW on a float32 model, and hence between checkpoints."""
    model, twin = small_model(bias=bias), small_model(seed=1, bias=bias)
    ours, plain = optimizer_of(model), twin.configure_optimizers(0.1, 1e-2, BETAS, "cpu")
    for seed in range(2):
        backward(model, seed)
        ours.step()
        ours.zero_grad()
    saved = saved_state(ours)
    assert isinstance(saved["param_groups"][0]["lr"], float)
    plain.load_state_dict(saved)
    again = optimizer_of(small_model(seed=2, bias=bias))
    again.load_state_dict(plain.state_dict())
    assert_same(again.state_dict()["state"], saved["state"])
    assert list(saved["state"]) == list(plain.state_dict()["state"])
    # the next update uses the loaded state
    twin.load_state_dict(ours.master_state_dict())
    loaded = optimizer_of(twin)
    loaded.load_state_dict(saved)
    for model_, optimizer in ((model, ours), (twin, loaded)):
        backward(model_, 5)
        optimizer.step()
    assert_same(ours.master_state_dict(), loaded.master_state_dict())


def test_the_bigram_model() -> None:
    torch.manual_seed(0)
    model = Bigram(small_config())
    optimizer = MasterAdamW(model, torch.float16, 0.1, 1e-1, BETAS)
    losses = []
    for _ in range(20):
        losses.append(backward(model, 0).item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert next(model.parameters()).dtype == torch.float16


def test_errors() -> None:
    with pytest.raises(TypeError, match="dtype must be .*bfloat16 or .*float16, got torch.float32"):
        optimizer_of(small_model(), torch.float32)
    with pytest.raises(TypeError, match="wte.weight must be float32 .* got torch.bfloat16"):
        optimizer_of(small_model().bfloat16())
    optimizer = optimizer_of(small_model())
    with pytest.raises(ValueError, match=r"must have \[10, 18\] parameters .* got \[10, 5\]"):
        optimizer.load_state_dict(optimizer_of(small_model(bias=False)).state_dict())
    other = optimizer_of(small_model(n_embd=16))
    with pytest.raises(ValueError, match="exp_avg of parameter 0 must have shape"):
        optimizer.load_state_dict(other.state_dict())
    assert math.isfinite(backward(small_model(), 0))
