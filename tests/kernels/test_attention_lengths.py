"""Attention with key lengths (``key_lengths``) and with shared key heads: parity of outputs and
gradients; padding has no influence.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.kernels.costs import COSTS
from tests.kernels.test_attention import assert_parity, seed_on
from tests.tools import interpreter, parity
from tests.tools.documents import starts_of
from tests.tools.sanitizer import sanitize

MODULES = [fused, torch_ops, reference]
# Tq, Tk, key lengths: no key, one, a tile's edge and next to it, all.
LENGTHS = [(70, 130, [0, 1, 64, 65, 130]), (70, 65, [65, 63]), (1, 1, [1, 0])]
CASES = pytest.mark.parametrize("n_queries,n_keys,lengths", LENGTHS, ids=str)
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


def inputs_of(
    device: str, batch: int, n_queries: int, n_keys: int, heads: tuple[int, int] = (2, 1)
) -> list[Tensor]:
    """q, k, v and dout; ``heads``: (query heads, key heads)."""
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
            parity.outcome(partial(m.attention, causal=causal, **options), inputs, grad)
            for m in (torch_ops, reference)
        ]
        if not options:
            pytorch = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
            runs.append(parity.outcome(pytorch, inputs, grad))
        for tensors in zip(*runs, strict=True):
            for x in tensors[1:]:
                torch.testing.assert_close(x, tensors[0], rtol=1e-5, atol=1e-5)


# Tq, Tk, lengths, (query heads, key heads), D, options. No length of 1: dq and dk would be 0 up to
# the rounding of O, which the plain op does not have.
PARITY: list[tuple[Any, ...]] = [
    (70, 130, [0, 65, 130], (1, 1), 16, dict(causal=False)),
    (130, 130, [17, 100], (2, 1), 25, dict(dropout_p=0.2)),
    (20, 130, [64, 0], (6, 2), 16, dict(causal=False, scale=0.3, dropout_p=0.3)),
    (70, 80, None, (4, 2), 128, {}),
    (1, 65, [64, 65], (3, 1), 64, dict(causal=False)),
]


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(PARITY)))
def test_parity(device: str, case: int, dtype: torch.dtype) -> None:
    n_queries, n_keys, lengths, (n_head, n_kv_head), head_size, options = PARITY[case]
    batch = 2 if lengths is None else len(lengths)
    q, grad = (
        parity.randn((batch, n_head, n_queries, head_size), dtype, device, parity.LAYOUTS[case % 4])
        for _ in range(2)
    )
    # Views of a joint projection to keys and values.
    kv = parity.randn((batch, n_keys, 2 * n_kv_head * head_size), dtype, device, "contiguous")
    k, v = kv.unflatten(2, (2, n_kv_head, head_size)).permute(2, 0, 3, 1, 4)
    if "dropout_p" in options:
        options = options | {"seed": seed_on(device), "dropout_offset": 3}
    if lengths is not None:
        options = options | {"key_lengths": of(lengths, device)}
    assert_parity("attention", [q, k, v], grad, **options)


@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_parity_of_documents_with_shared_keys(device: str, dtype: torch.dtype) -> None:
    *inputs, grad = (x.to(dtype) for x in inputs_of(device, 1, 140, 140))
    doc_start = starts_of(140, [30, 64, 100], device=device)
    assert_parity("attention", inputs, grad, doc_start=doc_start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_in_the_thousands(device: str, dtype: torch.dtype) -> None:
    """Zero padding would win the maximum of a row whose scores are all far below 0."""
    q, k, v, grad = (x.to(dtype) for x in inputs_of(device, 2, 70, 100))
    k = torch.where(torch.arange(2, device=device)[:, None, None, None] == 0, -k.abs(), k)
    with interpreter.gpu_arithmetic():
        assert_parity(
            "attention",
            [30.0 * q.abs(), 30.0 * k, v],
            grad,
            causal=False,
            key_lengths=of([70, 99], device),
        )


@CAUSAL
def test_shared_keys_are_repeated_keys(device: str, causal: bool) -> None:
    """Outputs and dq are equal bit for bit; dk and dv are summed over a group of heads."""
    *inputs, grad = inputs_of(device, 1, 70, 70, (6, 2))
    op = partial(fused.attention, causal=causal)
    shared = parity.outcome(op, inputs, grad)
    repeated = parity.outcome(
        op, [inputs[0], *(x.repeat_interleave(3, 1) for x in inputs[1:])], grad
    )
    assert all(torch.equal(x, y) for x, y in zip(shared[:2], repeated[:2], strict=True))
    for x, y in zip(shared[2:], repeated[2:], strict=True):
        torch.testing.assert_close(x, y.unflatten(1, (2, 3)).sum(2), rtol=1e-5, atol=1e-5)


@CAUSAL
@CASES
@pytest.mark.parametrize(
    "module,dtype", [*((m, torch.float32) for m in MODULES), (fused, torch.bfloat16)]
)
def test_a_row_is_what_it_is_alone(
    module, dtype: torch.dtype, n_queries: int, n_keys: int, lengths: list[int], causal: bool
) -> None:
    """Each row of a batch equals the row computed alone, bit for bit for our kernels."""
    *inputs, grad = (x.to(dtype) for x in inputs_of("cpu", len(lengths), n_queries, n_keys))
    tolerance = 0.0 if module is fused else 1e-5
    op = partial(module.attention, causal=causal)
    together = parity.outcome(partial(op, key_lengths=of(lengths)), inputs, grad)
    for b, length in enumerate(lengths):
        out, dq, dk, dv = (x[b : b + 1] for x in together)
        assert not dk[:, :, length:].any() and not dv[:, :, length:].any()
        if length == 0:
            assert not out.any() and not dq.any()
            continue
        q, k, v, row_grad = (x[b : b + 1] for x in (*inputs, grad))
        alone = parity.outcome(op, [q, k[:, :, :length], v[:, :, :length]], row_grad)
        for x, y in zip((out, dq, dk[:, :, :length], dv[:, :, :length]), alone, strict=True):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@CAUSAL
@pytest.mark.parametrize("module", MODULES)
def test_what_stands_in_padding_changes_no_bit(module, causal: bool) -> None:
    lengths = [0, 64, 70]
    *inputs, grad = inputs_of("cpu", len(lengths), 70, 130)
    op = partial(module.attention, causal=causal, key_lengths=of(lengths))
    before = parity.outcome(op, inputs, grad)
    for poison in (float("nan"), float("inf")):
        for x in inputs[1:]:
            for row, length in zip(x, lengths, strict=True):
                row[:, length:] = poison
        after = parity.outcome(op, inputs, grad)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@CAUSAL
def test_whatever_lengths_hold_is_within_bounds(causal: bool) -> None:
    """The sanitizer checks all addresses; invalid lengths are clamped."""
    *inputs, grad = inputs_of("cpu", 4, 20, 70)
    op = partial(fused.attention, causal=causal)
    wild, allowed = [-5, 200, -(2**31), 2**31 - 1], [0, 70, 0, 70]
    with sanitize():
        runs = [
            parity.outcome(partial(op, key_lengths=of(n)), inputs, grad) for n in (wild, allowed)
        ]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_tiles_of_padding_are_not_visited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts products: per tile 2 in forward, 3 for dq, 4 for dk and dv."""
    products, dot = [0], interpreter.Builder.create_dot

    def counted(*args: Any) -> Any:
        products[0] += 1
        return dot(*args)

    monkeypatch.setattr(interpreter.Builder, "create_dot", counted)
    *inputs, grad = inputs_of("cpu", 1, 64, 256)
    for length, n_tiles in ((256, 4), (129, 3), (64, 1), (1, 1), (0, 0)):
        products[0] = 0
        op = partial(fused.attention, causal=False, key_lengths=of([length]))
        parity.outcome(op, inputs, grad)
        assert products[0] == 9 * 2 * n_tiles  # two heads


def test_strided_lengths(device: str) -> None:
    *inputs, grad = inputs_of(device, 3, 20, 30)
    row = of([7], device)
    runs = [
        parity.outcome(partial(fused.attention, key_lengths=n), inputs, grad)
        for n in (row.expand(3), row.repeat(6)[::2], row.repeat(3))
    ]
    for run in runs[:2]:
        assert all(torch.equal(x, y) for x, y in zip(run, runs[2], strict=True))


def test_cost_is_that_of_all_keys() -> None:
    """Formulas do not read the lengths; bytes of shared keys count once."""
    q, k, v, _ = inputs_of("cpu", 1, 9, 7)
    op = torch.ops.fastgpt.attention
    costs = [
        COSTS[str(op)](op(*args), *args)[0]
        for args in (
            (q, *keys, n, None, None, False, 0.25, 0.0, 0)
            for keys in ((k, v), (k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)))
            for n in (None, of([3]))
        )
    ]
    assert costs[0] == costs[1] and costs[2] == costs[3]
    assert costs[0].flops == costs[2].flops
    assert costs[2].bytes - costs[0].bytes == k.nbytes + v.nbytes
