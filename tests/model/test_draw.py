"""Sampling a token from its logits: temperature, top-k, top-p, min-p, repetition penalty."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt.generation import Sampling, draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_draws_are_those_of_multinomial(dtype: torch.dtype) -> None:
    """Half-precision logits are sampled in float32."""
    logits = (torch.randn(5, 1000) * 3).to(dtype)
    torch.manual_seed(1)
    expected = torch.multinomial(logits.float().softmax(-1), 1)[:, 0]
    torch.manual_seed(1)
    assert torch.equal(draw(logits, Sampling()), expected)


def kept(logits: Tensor, **options: Any) -> list[set[int]]:
    """The set of tokens that occur in 3000 draws of each row."""
    return [set(draw(row.expand(3000, -1), Sampling(**options)).tolist()) for row in logits]


def test_frequencies_after_cuts_are_the_probabilities() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0]])
    rows = logits.expand(20000, -1)
    drawn = draw(rows, Sampling(temperature=0.5, top_k=3, min_p=0.01))
    expected = torch.softmax(logits[0, :3] / 0.5, dim=0)
    shares = torch.bincount(drawn, minlength=5)[:3] / len(rows)
    assert drawn.max() <= 2 and (shares - expected).abs().max() < 0.02


def test_cuts_keep_what_they_say() -> None:
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7]])
    logits = probs.log()
    assert kept(logits) == [{0, 1, 2, 3}] * 2
    assert kept(logits, top_k=2) == [{0, 1}, {0, 1, 2, 3}]  # ties are kept
    assert kept(logits, top_p=0.6) == [{0, 1}, {3}]
    assert kept(logits, top_p=0.75) == [{0, 1, 2}, {0, 3}]
    assert kept(logits, top_p=0.0) == kept(logits, min_p=1.0) == [{0}, {3}]
    assert kept(logits, min_p=0.45) == [{0, 1, 2}, {3}]


def test_against_hugging_face() -> None:
    """Tokens kept and their probabilities, for all combinations of options."""
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(4, 50) * 4
    idx = torch.randint(50, (4, 12))
    seen = torch.zeros(4, 50, dtype=torch.bool).scatter(1, idx, True)
    for options in itertools.product((1.0, 0.6), (None, 7), (1.0, 0.8), (0.0, 0.1), (1.0, 1.4)):
        temperature, top_k, top_p, min_p, penalty = options
        scores = process.RepetitionPenaltyLogitsProcessor(penalty)(idx, logits)
        scores = process.TemperatureLogitsWarper(temperature)(idx, scores)
        if top_k is not None:
            scores = process.TopKLogitsWarper(top_k)(idx, scores)
        scores = process.TopPLogitsWarper(top_p)(idx, scores)
        scores = process.MinPLogitsWarper(min_p)(idx, scores)
        sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
        probs = scores.softmax(-1)
        for seed in range(5):
            torch.manual_seed(seed)
            expected = torch.multinomial(probs, 1)[:, 0]
            torch.manual_seed(seed)
            assert torch.equal(draw(logits, sampling, seen), expected), options


def test_the_penalty_pushes_scores_down_on_both_sides_of_0() -> None:
    logits = torch.tensor([[-1.0, -1.4], [1.0, 0.8]])
    seen = torch.tensor([[True, False]] * 2)
    for penalty, best in ((1.2, [0, 0]), (1.3, [0, 1]), (1.5, [1, 1])):
        sampling = Sampling(0.0, repetition_penalty=penalty)
        assert draw(logits, sampling, seen).tolist() == best


class NoLook(TorchDispatchMode):
    """Fails if the host reads a tensor's value, which would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        looks = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        assert not any(name in str(func) for name in looks), func
        return func(*args, **(kwargs or {}))


def test_a_draw_never_waits_for_the_device() -> None:
    logits, seen = torch.randn(3, 50), torch.zeros(3, 50, dtype=torch.bool)
    with NoLook():
        draw(logits, Sampling(0.5, 7, 0.8, 0.1, 1.3), seen)
        draw(logits, Sampling(temperature=0.0))
    with pytest.raises(AssertionError, match="local_scalar_dense"), NoLook():
        torch.multinomial(logits.softmax(-1), 1)[0].item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 .greedy., or at least 1e-30 .*got -1.0"),
        ({"temperature": 1e-40}, r"temperature must be .*at least 1e-30 .*got 1e-40"),
        ({"temperature": math.inf}, r"temperature must be .*finite, got inf"),
        ({"top_k": 0}, r"top_k must be at least 1, or None for all tokens, got 0"),
        ({"top_k": 3.0}, r"top_k must be an integer, or None for all tokens, got 3.0"),
        ({"top_p": 1.5}, r"top_p must lie between 0 and 1, got 1.5"),
        ({"min_p": -0.1}, r"min_p must lie between 0 and 1, got -0.1"),
        ({"min_p": math.nan}, r"min_p must lie between 0 and 1, got nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be positive .*got 0.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Sampling(**options)
