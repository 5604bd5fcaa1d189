"""Small transformers models with ``fastgpt``'s ops and with their own layers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.interop import transformers as fast

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

VOCABULARY, LENGTH = 61, 12
SHAPE = dict(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, pad_token_id=0)
DROPOUT = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
# A kind of ``inputs`` → how the attention op is called for it; None: PyTorch's attention.
SIDES = {
    "none": "causal",
    "full": "causal",
    "right": "causal key_lengths",
    "left": "causal doc_start",
    "both": "causal doc_start",
    "documents": "causal doc_start",
    "holes": None,
    "whole": None,
}


def gpt2(attention: str = "eager", kind: str = "GPT2LMHeadModel", **options: Any) -> Any:
    """A GPT-2 with the same weights whatever the attention."""
    torch.manual_seed(0)
    options = dict.fromkeys(DROPOUT, 0.0) | {"n_layer": 2} | options
    config = transformers.GPT2Config(n_positions=32, n_head=4, n_embd=32, **SHAPE, **options)
    config._attn_implementation = attention
    return getattr(transformers, kind)(config).eval()


def llama(attention: str = "eager", kind: str = "Llama", **options: Any) -> Any:
    """A Llama-like model: four query heads of size 128, two key heads."""
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
    if side == "documents":  # two in each sequence, marked by the positions
        positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(3, -1)
        return {"position_ids": positions}
    if side == "whole":  # a custom mask: each token sees itself and the first
        visible = torch.eye(LENGTH, dtype=torch.bool)
        visible[:, 0] = True
        return {"attention_mask": torch.where(visible, 0.0, -1e9).expand(3, 1, -1, -1)}
    return {"attention_mask": padding(side)}


def is_token(side: str) -> Tensor:
    mask = padding(side)
    return torch.ones(3, LENGTH, dtype=torch.bool) if mask is None else mask.bool()


def close(a: Tensor, b: Tensor) -> None:
    factor = 10 if torch.cuda.is_available() else 1  # a GPU sums in another order
    torch.testing.assert_close(a, b, atol=2e-6 * factor, rtol=1e-4 * factor)


def assert_same(model: Any, plain: Any, side: str = "none", **more: Any) -> None:
    """Assert that the logits and all gradients of both models agree."""
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


def patched(**options: Any) -> Any:
    return fast.apply_to(gpt2("sdpa", **options))


def losses(model: Any, side: str = "none", **more: Any) -> Any:
    x, used = tokens().to(model.device), is_token(side).to(model.device)
    labels = x.masked_fill(~used, -100)
    labels[:, 0] = -100
    labels[:, 1:][~used[:, :-1]] = -100  # labels predicted from padding
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
