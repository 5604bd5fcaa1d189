"""``fastgpt``'s attention in transformers' models against transformers' own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt.interop import transformers as fast
from fastgpt.interop.transformers_attention import attention, attention_mask
from tests.interop.small_transformers import (
    LENGTH,
    SIDES,
    assert_same,
    close,
    gpt2,
    is_token,
    llama,
    mistral,
    padding,
    patched,
    tokens,
    transformers,
)

CausalLMOutput = transformers.modeling_outputs.CausalLMOutputWithCrossAttentions
CACHE = "cache" if hasattr(CausalLMOutput(), "cache") else "past_key_values"
BUILDERS = {"gpt2": gpt2, "llama": llama, "mistral": mistral}


@pytest.fixture(autouse=True)
def _registered() -> None:
    fast.register()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("build", [gpt2, llama])
def test_attention(build: Callable[..., Any], side: str, calls: list[str]) -> None:
    assert_same(build("fastgpt"), build(), side)
    form = SIDES[side]
    assert calls == ([] if form is None else 2 * [form])


def test_a_step_of_a_static_cache_is_told_by_lengths() -> None:
    """Lengths in every step, so that one graph serves all; a full mask if the model asks for it."""
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


@pytest.mark.parametrize("side", ["none", "right", "left", "holes"])
def test_a_sliding_window(side: str, calls: list[str]) -> None:
    assert_same(mistral("fastgpt"), mistral(), side)
    assert calls == (2 * ["causal doc_start"] if side in ("none", "left") else [])


@pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)
@pytest.mark.parametrize("static", [False, True])
def test_a_prompt_in_chunks(build: Callable[..., Any], static: bool) -> None:
    """For a chunk after cached tokens, the causal mask is offset."""
    model, plain, x = build("fastgpt"), build(), tokens()
    cache = transformers.StaticCache(model.config, max_cache_len=20) if static else None
    with torch.no_grad():
        expected = plain(x).logits
        for start, end in ((0, 4), (4, 9), (9, 10), (10, LENGTH)):
            out = model(x[:, start:end], use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            close(out.logits, expected[:, start:end])


def in_place(attention: str = "eager") -> Any:
    """GPT-2 with ``fastgpt``'s layers as well, and two beams."""
    model = patched() if attention == "fastgpt" else gpt2()
    model.generation_config.num_beams = 2
    return model


@pytest.mark.parametrize("build", [*BUILDERS.values(), in_place], ids=[*BUILDERS, "in_place"])
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
    """Fall back for values of another size than the keys, and for a position bias."""
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


def test_autocast_of_rotated_heads() -> None:
    """q and k are float32 after the rotary embedding, v is not."""
    model, plain = llama("fastgpt"), llama("sdpa")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, plain(tokens()).logits)
