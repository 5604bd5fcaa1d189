"""transformers' GPT-2 with ``fastgpt``'s layers against the same model with its own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt.interop import transformers as fast
from fastgpt.interop import transformers_attention
from fastgpt.kernels import fused
from tests.interop.small_transformers import (
    DROPOUT,
    LENGTH,
    SIDES,
    VOCABULARY,
    assert_same,
    assert_same_loss,
    close,
    gpt2,
    inputs,
    is_token,
    llama,
    losses,
    patched,
    tokens,
    transformers,
)

OPTIONS = [
    {},
    {"activation_function": "gelu"},
    {"activation_function": "gelu_pytorch_tanh", "n_inner": 48, "layer_norm_epsilon": 1e-3},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "tie_word_embeddings": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layers(options: dict[str, Any]) -> None:
    model, plain = patched(**options), gpt2(**options)
    assert_same(model, plain)
    assert_same_loss(model.train(), plain.train())
    assert losses(model).logits is None  # not materialised
    assert losses(model.eval()).logits.shape == (3, LENGTH, VOCABULARY)


@pytest.mark.parametrize("side", [side for side in SIDES if side != "whole"])
def test_the_loss_with_padding(side: str, calls: list[str]) -> None:
    assert_same_loss(patched().train(), gpt2().train(), side)
    form = SIDES[side]
    assert calls == ([] if form is None else 2 * [form])


def test_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fast, transformers_attention):
        monkeypatch.setattr(module, "ops", fused)
    model, plain = patched(n_layer=1).train(), gpt2(n_layer=1).train()
    for side in ("right", "left"):
        assert_same_loss(model, plain, side)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("side", [side for side in SIDES if side != "whole"])
def test_on_a_gpu(side: str) -> None:
    model, plain = patched().cuda().train(), gpt2("sdpa").cuda().train()
    assert_same_loss(model, plain, side)
    for each in (model, plain):
        each.bfloat16()
    assert abs(losses(model, side).loss - losses(plain, side).loss) < 2e-2
    if side == "left":
        mask, x = is_token(side).long().cuda(), tokens().cuda()
        options: dict[str, Any] = dict(max_new_tokens=4, eos_token_id=None, do_sample=False)
        assert model.generate(x, attention_mask=mask, **options).shape == (3, LENGTH + 4)


def test_arguments_of_the_loss() -> None:
    model, plain, x = patched().train(), gpt2().train(), tokens()
    for more in (
        {"num_items_in_batch": torch.tensor(40)},
        {"num_items_in_batch": 40, "ignore_index": 7},
        {"shift_labels": x.flip(1)},
    ):
        assert_same_loss(model, plain, **more)
    loss, *hidden = model(x, labels=x, return_dict=False, output_hidden_states=True)
    expected = plain(x, labels=x, output_hidden_states=True)
    close(loss, expected.loss)
    for got, wanted in zip(hidden[-1], expected.hidden_states, strict=True):
        close(got, wanted)


def test_a_loss_of_ones_own_gets_the_logits() -> None:
    model = patched().train()
    model.loss_function = lambda logits, labels, **_: logits.sum()
    assert losses(model).loss == losses(model).logits.sum()


@pytest.mark.parametrize("given", [{}, {"is_causal": False}])
def test_attention_to_every_token(given: dict[str, Any]) -> None:
    model, plain = patched(), gpt2("sdpa")
    for each in (model, plain) if not given else ():
        for block in each.transformer.h:
            block.attn.is_causal = False
    assert_same(model, plain, **given)
    assert not torch.equal(model(tokens(), **given).logits, patched()(tokens()).logits)


def test_undo_is_equal_to_the_bit() -> None:
    def results(model: Any) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(2)
        out = losses(model)
        out.loss.backward()
        return [out.loss, out.logits, *(p.grad for p in model.parameters())]

    dropout: dict[str, Any] = dict.fromkeys(DROPOUT, 0.1)
    model = gpt2("sdpa", **dropout).train()
    before, state = results(model), [set(m.__dict__) for m in model.modules()]
    names = list(model.state_dict())
    for _ in range(2):
        fast.apply_to(fast.apply_to(model))
        assert list(model.state_dict()) == names and losses(model).logits is None
        assert fast.undo(model) is model
        assert all(map(torch.equal, before, results(model)))
        assert [set(m.__dict__) for m in model.modules()] == state
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="model must be patched by apply_to, got GPT2LMHeadModel"):
        fast.undo(model)


def test_a_copy_and_saved_files(tmp_path: Path) -> None:
    model = patched().train()
    other = copy.deepcopy(model)
    nn.init.zeros_(model.transformer.wte.weight)
    assert_same_loss(other, gpt2().train())
    fast.undo(other)
    assert losses(model).logits is None
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.config._attn_implementation != fast.NAME
    assert torch.equal(again.transformer.h[1].ln_2.weight, model.transformer.h[1].ln_2.weight)


def test_a_wrapped_forward_survives_undo() -> None:
    """A trainer's mixed precision and TRL's value head wrap ``forward`` like this."""
    model = patched().train()
    inner, seen = model.forward, []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return inner(*args, **kwargs)

    model.forward = wrapped
    fast.undo(model)
    assert torch.equal(losses(model).logits, losses(gpt2("sdpa").train()).logits)
    fast.apply_to(model)
    assert losses(model).logits is None and len(seen) == 2


def test_hooked_and_replaced_layers_are_called() -> None:
    def change(model: Any) -> Any:
        first, second = model.transformer.h
        first.ln_2.register_forward_hook(lambda module, args, out: 2.0 * out)
        first.mlp.act = nn.ReLU()
        second.ln_2 = nn.RMSNorm(32)
        second.attn.c_attn.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
        second.ln_1.forward = lambda x: x.tanh()
        model.lm_head.register_forward_hook(lambda module, args, out: out.sin())
        return model.train()

    model, plain = change(patched()), change(gpt2())
    assert_same_loss(model, plain)
    assert_same_loss(fast.apply_to(change(gpt2("sdpa"))), plain)


@pytest.mark.parametrize(
    "model, message",
    [
        (gpt2(activation_function="relu"), "activation_function must be .*gelu.*, got 'relu'"),
        (gpt2(add_cross_attention=True), "add_cross_attention must be False, got True"),
        (gpt2(reorder_and_upcast_attn=True), "reorder_and_upcast_attn must be False, got True"),
        (llama(), "model must be a GPT-2.*LlamaForCausalLM"),
        (nn.Linear(2, 2), "model must be a GPT-2.*Linear"),
    ],
)
def test_what_is_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fast.apply_to(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    if not isinstance(model, nn.Linear):
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "kind", ["GPT2Model", "GPT2ForSequenceClassification", "GPT2DoubleHeadsModel"]
)
def test_other_heads(kind: str) -> None:
    model, plain = fast.apply_to(gpt2("sdpa", kind)), gpt2(kind=kind)
    first, expected = (each(tokens(), **inputs("right"))[0] for each in (model, plain))
    close(first, expected) if kind != "GPT2Model" else close(
        first[is_token("right")], expected[is_token("right")]
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = patched(**dict.fromkeys(DROPOUT, 0.1)).train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        losses(model, "right").loss.backward()
        found.append([p.grad for p in model.parameters()])
    for got, expected in zip(*found, strict=True):
        close(got, expected)


@pytest.mark.parametrize("side", ["none", "right"])
def test_compiled(side: str, calls: list[str]) -> None:
    torch._dynamo.reset()
    model = patched(n_layer=1).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_loss(compiled, model, side)
    # A graph cannot read a mask's values, so it passes the full mask to PyTorch's attention.
    assert calls == (2 * ["causal"] if side == "none" else ["causal key_lengths"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision(dtype: torch.dtype) -> None:
    """bfloat16 weights, or float32 weights under autocast."""
    model, plain = (each.train().to(dtype) for each in (patched(), gpt2("sdpa")))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        got, expected = losses(model, "left").loss, losses(plain, "left").loss
    got.backward()
    assert got.dtype == torch.float32 and abs(got - expected) < 2e-2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
