"""Attention over keys of given lengths (``key_lengths``), and with heads that share keys: parity of
outputs and gradients, and that padding changes nothing.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import reference, torch_ops
from tests.kernels.test_attention import results

MODULES = [torch_ops, reference]
# Tq, Tk, and the lengths of the keys: none, one, at an edge of a tile and beside it, all.
LENGTHS = [(70, 130, [0, 1, 64, 65, 130]), (130, 70, [70, 0, 63]), (1, 1, [1, 0])]
CASES = pytest.mark.parametrize("n_queries,n_keys,lengths", LENGTHS, ids=str)
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def inputs_of(
    device: str, batch: int, n_queries: int, n_keys: int, heads: tuple[int, int] = (2, 1)
) -> list[Tensor]:
    """q, k, v and the gradient, for (query heads, key heads)."""
    shapes = [(heads[0], n_queries), (heads[1], n_keys), (heads[1], n_keys), (heads[0], n_queries)]
    return [torch.randn(batch, *shape, 16, device=device) for shape in shapes]


def of(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=device)


@CAUSAL
@CASES
def test_torch_ops(n_queries: int, n_keys: int, lengths: list[int], causal: bool) -> None:
    *inputs, grad = inputs_of("cpu", len(lengths), n_queries, n_keys, (4, 2))
    for options in ({}, {"key_lengths": of(lengths)}):
        runs = [
            results(partial(m.attention, causal=causal, **options), inputs, grad)
            for m in (torch_ops, reference)
        ]
        for x, y in zip(*runs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@CAUSAL
@CASES
@pytest.mark.parametrize("module", MODULES)
def test_a_row_is_what_it_is_alone(
    module, n_queries: int, n_keys: int, lengths: list[int], causal: bool
) -> None:
    *inputs, grad = inputs_of("cpu", len(lengths), n_queries, n_keys)
    op = partial(module.attention, causal=causal)
    together = results(partial(op, key_lengths=of(lengths)), inputs, grad)
    for b, length in enumerate(lengths):
        out, dq, dk, dv = (x[b : b + 1] for x in together)
        assert not dk[:, :, length:].any() and not dv[:, :, length:].any()
        if length == 0:
            assert not out.any() and not dq.any()
            continue
        q, k, v, row_grad = (x[b : b + 1] for x in (*inputs, grad))
        alone = results(op, [q, k[:, :, :length], v[:, :, :length]], row_grad)
        for x, y in zip((out, dq, dk[:, :, :length], dv[:, :, :length]), alone, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@CAUSAL
@pytest.mark.parametrize("module", MODULES)
def test_what_stands_in_padding_changes_no_bit(module, causal: bool) -> None:
    lengths = [0, 1, 64, 70, 100]
    *inputs, grad = inputs_of("cpu", len(lengths), 90, 100)
    op = partial(module.attention, causal=causal, key_lengths=of(lengths))
    before = results(op, inputs, grad)
    for poison in (float("nan"), float("inf"), 0.0):
        for x in inputs[1:]:
            for row, length in zip(x, lengths, strict=True):
                row[:, length:] = poison
        after = results(op, inputs, grad)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("module", MODULES)
def test_errors(module) -> None:
    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 4, 4, 8)
    doc_start = torch.zeros(2, 4, dtype=torch.int32)
    lengths = of([4, 0])
    cases: list[tuple[type[Exception], str, Tensor, dict[str, Any]]] = [
        (TypeError, "key_lengths must be a torch.Tensor, got list", q, {"key_lengths": [4, 0]}),
        (TypeError, "key_lengths must be torch.int32, got torch.int64", q,
         {"key_lengths": lengths.long()}),
        (ValueError, r"key_lengths must have shape \(2,\) to go with q \(2, 6, 4, 8\), got \(1,\)",
         q, {"key_lengths": lengths[:1]}),
        (ValueError, r"key_lengths must be on the device of q \(cpu\), got meta", q,
         {"key_lengths": lengths.to("meta")}),
        (ValueError, "key_lengths must be None together with doc_start, got a tensor", q,
         {"key_lengths": lengths, "doc_start": doc_start}),
        (ValueError, r"k must have shape \(2, 6, T, 8\), or a divisor of 6 as its number of heads, "
         r"to go with q \(2, 6, 4, 8\), got \(2, 4, 4, 8\)", k, {}),
        (ValueError, "k must have shape .* got", k[:, :0], {}),
        (ValueError, "k must have shape .* got", q.repeat(1, 2, 1, 1), {}),
    ]  # fmt: skip
    for error, message, keys, options in cases:
        with pytest.raises(error, match=message):
            module.attention(q, keys, keys, **options)
