"""``GPT.generate``: nanoGPT's draws, greedy decoding, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastgpt import GPT
from tests.tools.small_models import BLOCK, V, small_model, tokens


def plain_generate(model, idx, max_new_tokens, temperature=1.0, top_k=None):
    """nanoGPT's sampling, step by step, by its description."""
    for _ in range(max_new_tokens):
        window = idx if idx.shape[1] <= BLOCK else idx[:, -BLOCK:]
        with torch.no_grad():
            scores = model(window)[0][:, -1, :] / temperature
        if top_k is not None:
            worst = torch.topk(scores, min(top_k, V))[0][:, [-1]]
            scores[scores < worst] = -float("inf")
        drawn = torch.multinomial(F.softmax(scores, dim=-1), num_samples=1)
        idx = torch.cat((idx, drawn), dim=1)
    return idx


def sharp_model() -> GPT:
    """Logits far apart, so that a wrong temperature or cut changes the draws."""
    model = small_model().eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 5, 1000])
def test_generate_draws_nanogpts_tokens(temperature, top_k):
    model, prompt = sharp_model(), tokens(2, 3)
    torch.manual_seed(7)
    expected = plain_generate(model, prompt, 20, temperature, top_k)  # past the window
    torch.manual_seed(7)
    assert torch.equal(model.generate(prompt, 20, temperature, top_k), expected)


def test_generate_greedy_takes_the_likeliest():
    model, prompt = sharp_model(), tokens(2, 3)
    state = torch.get_rng_state()
    greedy = model.generate(prompt, 20, temperature=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(greedy, plain_generate(model, prompt, 20, top_k=1))
    assert torch.equal(model.generate(prompt, 20, temperature=0.0, top_k=3), greedy)


def test_generate_sees_the_last_block_only():
    model = sharp_model()
    x = tokens(1, BLOCK + 5)
    y = x.clone()
    y[:, :5] = 0
    new = [model.generate(prompt, 8, temperature=0)[:, BLOCK + 5 :] for prompt in (x, y)]
    assert torch.equal(*new)


def test_generate_leaves_mode_prompt_and_gradients_alone():
    model, prompt = small_model(dropout=0.5), tokens(1, 2)
    kept = prompt.clone()
    out = model.generate(prompt, 3)
    assert model.training and torch.equal(prompt, kept) and not out.requires_grad
    assert not model.eval().generate(prompt, 3).requires_grad and not model.training
    assert torch.equal(model.generate(prompt, 0), prompt)
    assert torch.equal(model.generate(prompt.int(), 3, 0), model.generate(prompt, 3, 0))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "message"),
    [
        (tokens(1, 0), {}, ValueError, r"idx must have shape .* T of at least 1, got \(1, 0\)"),
        (torch.tensor([[1, V]]), {}, ValueError, r"idx must .* 0 to 64 .*got 65"),
        (torch.tensor([[-1, 2]]), {}, ValueError, r"idx must .* 0 to 64 .*got -1"),
        (tokens().float(), {}, TypeError, r"idx must be torch.int64 .*float32"),
        (tokens(), {"temperature": -0.5}, ValueError, r"temperature must .*got -0.5"),
        (tokens(), {"temperature": math.nan}, ValueError, r"temperature must .*got nan"),
        (tokens(), {"top_k": 0}, ValueError, r"top_k must .*got 0"),
        (tokens(), {"top_k": -3}, ValueError, r"top_k must .*got -3"),
        (tokens(), {"max_new_tokens": -1}, ValueError, r"max_new_tokens must .*got -1"),
    ],
)
def test_generate_refuses(prompt, arguments, error, message):
    with pytest.raises(error, match=message):
        small_model().generate(prompt, **{"max_new_tokens": 1, **arguments})
