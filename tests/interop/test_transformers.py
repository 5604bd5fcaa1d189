"""transformers' models on the ops of ``fastgpt``, against transformers' own layers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt.interop import transformers as fast
from fastgpt.interop import transformers_attention
from fastgpt.interop.transformers_attention import attention, attention_mask
from fastgpt.kernels import fused

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

CausalLMOutput = transformers.modeling_outputs.CausalLMOutputWithCrossAttentions

VOCABULARY, LENGTH = 61, 12
SHAPE = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=0)
CACHE = "cache" if hasattr(CausalLMOutput(), "cache") else "past_key_values"
DROPOUT = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


def gpt2(attention: str = "eager", kind: str = "GPT2LMHeadModel", **options: Any) -> Any:
    """The same weights for any attention."""
    torch.manual_seed(0)
    options = dict.fromkeys(DROPOUT, 0.0) | {"n_layer": 2} | options
    config = transformers.GPT2Config(n_positions=32, n_head=4, n_embd=32, **SHAPE, **options)
    config._attn_implementation = attention
    return getattr(transformers, kind)(config).eval()


def llama(attention: str = "eager", kind: str = "Llama", **options: Any) -> Any:
    """Four query heads of size 128, which share two heads of keys."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        **SHAPE,
        **options,
    )
    config._attn_implementation = attention
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def mistral(attention: str = "eager") -> Any:
    return llama(attention, "Mistral", sliding_window=4)


BUILDERS = {"gpt2": gpt2, "llama": llama, "mistral": mistral}


def tokens(batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.manual_seed(1))


def padding(side: str) -> Tensor | None:
    """(3, LENGTH), 1 for a token."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, 5:], mask[1, 9:] = 0, 0
    if side == "left":
        return mask.flip(1)
    if side == "both":
        mask[1] = mask[1].flip(0)
    if side == "holes":
        mask[2, 3:5] = 0
    return {"none": None, "full": torch.ones_like(mask)}.get(side, mask)


def inputs(side: str) -> dict[str, Any]:
    if side == "documents":  # two in each sequence, told by the positions
        positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(3, -1)
        return {"position_ids": positions}
    if side == "whole":  # somebody's own mask: each token sees itself and the first
        visible = torch.eye(LENGTH, dtype=torch.bool)
        visible[:, 0] = True
        return {"attention_mask": torch.where(visible, 0.0, -1e9).expand(3, 1, -1, -1)}
    return {"attention_mask": padding(side)}


def is_token(side: str) -> Tensor:
    mask = padding(side)
    return torch.ones(3, LENGTH, dtype=torch.bool) if mask is None else mask.bool()


def close(a: Tensor, b: Tensor) -> None:
    factor = 10 if torch.cuda.is_available() else 1  # a GPU adds in another order
    torch.testing.assert_close(a, b, atol=2e-6 * factor, rtol=1e-4 * factor)


def assert_same(model: Any, plain: Any, side: str = "none", **more: Any) -> None:
    """Logits, and every gradient of them."""
    x, used = tokens(), is_token(side)
    results = []
    for each in (model, plain):
        each.zero_grad()
        logits = each(x, use_cache=False, **inputs(side), **more).logits[used]
        logits.square().sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in each.named_parameters()}))
    (got, grads), (expected, expected_grads) = results
    close(got, expected)
    assert grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        scale = 1.0 + grad.abs().max()
        close(grads[name] / scale, grad / scale)


@pytest.fixture(autouse=True)
def _registered() -> None:
    fast.register()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of causal, key_lengths and doc_start each call of the op of attention was given."""
    seen: list[str] = []

    def spied(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            given = [name for name in ("key_lengths", "doc_start") if kwargs.get(name) is not None]
            seen.append(" ".join((["causal"] if kwargs.get("causal", True) else []) + given))
            return op(*args, **kwargs)

        return call

    for name in ("attention", "attention_qkvpacked"):
        monkeypatch.setattr(fast.ops, name, spied(getattr(fast.ops, name)))
    return seen


# -- the attention alone

SIDES = {
    "none": "causal",
    "full": "causal",
    "right": "causal key_lengths",
    "left": "causal doc_start",
    "both": "causal doc_start",
    "documents": "causal doc_start",
    "holes": None,  # PyTorch's attention
    "whole": None,
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("build", [gpt2, llama])
def test_attention(build: Callable[..., Any], side: str, calls: list[str]) -> None:
    assert_same(build("fastgpt"), build(), side)
    form = SIDES[side]
    assert calls == ([] if form is None else 2 * [form])


def test_a_step_of_a_static_cache_is_told_by_lengths() -> None:
    """In each step, so that one graph serves them all; whole where a model asks for it."""
    options: dict[str, Any] = dict(
        batch_size=3,
        q_length=1,
        kv_length=8,
        mask_function=transformers.masking_utils.causal_mask_function,
        allow_is_causal_skip=False,
    )
    for place in (5, 7):
        offset, mask = torch.tensor([place]), torch.ones(3, place + 1, dtype=torch.bool)
        for padding_mask in (None, mask):
            made = attention_mask(**options, q_offset=offset, attention_mask=padding_mask)
            assert made is not None and made.dtype == torch.int32
            assert torch.equal(made, torch.full((3, 1, 1, 1), place + 1, dtype=torch.int32))
    made = attention_mask(**options, q_offset=7)
    assert made is not None and made.dtype == torch.bool and made.shape == (3, 1, 1, 8)


def test_a_sliding_window(calls: list[str]) -> None:
    assert_same(mistral("fastgpt"), mistral())
    assert calls == 2 * ["causal doc_start"]


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
def test_no_token_sees_a_later_one(build: Callable[..., Any], side: str) -> None:
    model, x, used = build("fastgpt"), tokens(), is_token(side)
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % VOCABULARY
    changed[~used] = 9  # nor padding
    with torch.no_grad():
        before, after = (model(ids, **inputs(side)).logits for ids in (x, changed))
    used[:, 7:] = False
    assert torch.equal(before[used], after[used])
    if side == "none":
        assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_in_chunks(build: Callable[..., Any], static: bool) -> None:
    """A chunk behind a cache is not causal from the first key on."""
    model, plain, x = build("fastgpt"), build(), tokens()
    cache = transformers.StaticCache(model.config, max_cache_len=20) if static else None
    with torch.no_grad():
        expected = plain(x).logits
        for start, end in ((0, 4), (4, 9), (9, 10), (10, LENGTH)):
            out = model(x[:, start:end], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            close(out.logits, expected[:, start:end])


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("side", ["full", "left"])
def test_generate(build: Callable[..., Any], static: bool, side: str, calls: list[str]) -> None:
    options: dict[str, Any] = dict(
        attention_mask=padding(side), max_new_tokens=4, eos_token_id=None, do_sample=False
    )
    if static:
        options |= dict(cache_implementation="static", disable_compile=True)
    ids = [each.generate(tokens(), **options) for each in (build("fastgpt"), build())]
    assert torch.equal(*ids)
    if build is gpt2 and side == "full":
        step = "key_lengths" if static else ""
        assert calls == 2 * ["causal"] + 3 * 2 * [step]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(softcap=30.0), "softcap must be None"),
        (dict(s_aux=torch.zeros(4)), "s_aux must be None"),
    ],
)
def test_an_argument_that_would_be_lost(arguments: dict[str, Any], message: str) -> None:
    q = torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match=message):
        attention(nn.Module(), q, q, q, None, **arguments)


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_the_op_does_not_compute(side: str, calls: list[str]) -> None:
    """Values of another size than the keys, and a bias of positions, with a short mask."""
    functions = transformers.masking_utils
    options: dict[str, Any] = dict(
        batch_size=3,
        q_length=LENGTH,
        kv_length=LENGTH,
        mask_function=functions.causal_mask_function,
        attention_mask=is_token(side),
    )
    mask, whole = attention_mask(**options), functions.sdpa_mask(**options)
    assert mask is not None and mask.dtype == torch.int32
    q, k = torch.randn(2, 3, 2, LENGTH, 8)
    cases: list[tuple[Tensor, dict[str, Any]]] = [
        (torch.randn(3, 2, LENGTH, 4), {}),
        (k, {"position_bias": torch.randn(1, 2, LENGTH, LENGTH)}),
    ]
    for v, more in cases:
        out, _ = attention(nn.Module(), q, k, v, mask, **more)
        scores = q @ k.mT / 8**0.5 + more.get("position_bias", 0.0)
        expected = scores.masked_fill(~whole, -1e9).softmax(-1) @ v
        used = is_token(side)
        close(out[used], expected.transpose(1, 2)[used])
    assert not calls


# -- a GPT-2 in place

OPTIONS = [
    {},
    {"activation_function": "gelu"},
    {"activation_function": "gelu_pytorch_tanh", "n_inner": 48, "layer_norm_epsilon": 1e-3},
    {"scale_attn_by_inverse_layer_idx": True},
    {"scale_attn_weights": False, "tie_word_embeddings": False},
]


def patched(**options: Any) -> Any:
    return fast.apply_to(gpt2("sdpa", **options))


def losses(model: Any, side: str = "none", **more: Any) -> Any:
    x, used = tokens().to(model.device), is_token(side).to(model.device)
    labels = x.masked_fill(~used, -100)
    labels[:, 0] = -100
    labels[:, 1:][~used[:, :-1]] = -100  # what padding predicts
    given = {k: v if v is None else v.to(model.device) for k, v in inputs(side).items()}
    return model(x, labels=labels, use_cache=False, **given, **more)


def assert_same_loss(model: Any, plain: Any, side: str = "none", **more: Any) -> None:
    found = []
    for each in (model, plain):
        each.zero_grad()
        loss = losses(each, side, **more).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in each.parameters())])
    for got, expected in zip(*found, strict=True):
        close(got, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layers(options: dict[str, Any]) -> None:
    model, plain = patched(**options), gpt2(**options)
    assert_same(model, plain)
    assert_same_loss(model.train(), plain.train())
    assert losses(model).logits is None  # never in memory
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


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("side", ["full", "left"])
def test_generate_with_the_layers(static: bool, side: str) -> None:
    options: dict[str, Any] = dict(attention_mask=padding(side), max_new_tokens=4, num_beams=2)
    options |= dict(eos_token_id=None, do_sample=False)
    if static:
        options |= dict(cache_implementation="static", disable_compile=True)
    ids = [each.generate(tokens(), **options) for each in (patched(), gpt2())]
    assert torch.equal(*ids)


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
    """As a trainer's mixed precision, or TRL's head, wraps it."""
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
    "option, message",
    [
        ({"activation_function": "relu"}, "activation_function must be 'gelu' or .* got 'relu'"),
        ({"add_cross_attention": True}, "add_cross_attention must be False, got True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn must be False, got True"),
    ],
)
def test_refused_options(option: dict[str, Any], message: str) -> None:
    model = gpt2(**option)
    with pytest.raises(ValueError, match=message):
        fast.apply_to(model)
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_refused_families() -> None:
    for model in (llama(), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"model must be a GPT-2.*{type(model).__name__}"):
            fast.apply_to(model)


@pytest.mark.parametrize(
    "kind", ["GPT2Model", "GPT2ForSequenceClassification", "GPT2DoubleHeadsModel"]
)
def test_other_heads(kind: str) -> None:
    model, plain = fast.apply_to(gpt2("sdpa", kind)), gpt2(kind=kind)
    first, expected = (each(tokens(), **inputs("right"))[0] for each in (model, plain))
    close(first, expected) if kind != "GPT2Model" else close(
        first[is_token("right")], expected[is_token("right")]
    )


# -- training


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
    model = patched().train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_loss(compiled, model, side)
    # Values of a mask cannot be read in a graph, so PyTorch's attention has the whole mask.
    assert calls == (4 * ["causal"] if side == "none" else 2 * ["causal key_lengths"])


def test_autocast_of_rotated_heads() -> None:
    """q and k are float32 behind the rotation, v is not."""
    model, plain = llama("fastgpt"), llama("sdpa")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision(dtype: torch.dtype) -> None:
    """Weights in bfloat16, or autocast."""
    model, plain = (each.train().to(dtype) for each in (patched(), gpt2("sdpa")))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        got, expected = losses(model, "left").loss, losses(plain, "left").loss
    got.backward()
    assert got.dtype == torch.float32 and abs(got - expected) < 2e-2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
