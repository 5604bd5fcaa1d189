"""Linear layers of few rows on a CPU: the numbers, and when they are taken."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import RoundedOnce
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.kernels import _costs, few_rows, portable
from fastgpt.kernels.few_rows import MAX_ROWS

# (shape of x, outputs)
SHAPES = [
    ((1, 768), 2304),
    ((1, 1, 3072), 768),
    ((40,), 24),
    ((1, 1), 1),
    ((2, 7), 3),
    ((4, 1, 65), 130),
    ((MAX_ROWS, 96), 33),
]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _inputs(shape: tuple[int, ...], n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape), torch.randn(n, shape[-1]).requires_grad_()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape,n", SHAPES, ids=str)
@torch.no_grad()
def test_parity(shape: tuple[int, ...], n: int, strided: bool, threads: int) -> None:
    x, weight = _inputs(shape, n)
    if strided:
        x = torch.stack((x, x), dim=-1)[..., 0]
        weight = weight.t().contiguous().t()
    assert few_rows.suits(x, weight)
    y = few_rows.linear(x, weight)
    exact = F.linear(x.double(), weight.double())
    assert y.dtype == torch.float32 and y.shape == exact.shape and y.is_contiguous()
    with RoundedOnce():
        common = F.linear(x, weight)
    assert (y - exact).abs().max() <= 2 * (common - exact).abs().max() + 1e-5


def test_the_operator(threads: int) -> None:
    for shape, n in SHAPES:
        x, weight = _inputs(shape, n)
        tests = ("test_schema", "test_faketensor")
        args = x.reshape(-1, shape[-1]), weight.detach()
        torch.library.opcheck(torch.ops.fastgpt.linear_few_rows.default, args, test_utils=tests)


@torch.no_grad()
def test_flops_are_counted(threads: int) -> None:
    _costs.publish()
    for rows in (1, 3):
        with FlopCounterMode(display=False) as counter:
            portable.linear(torch.randn(rows, 16), torch.randn(8, 16))
        assert counter.get_total_flops() == 2 * rows * 16 * 8


@pytest.mark.parametrize("bias", [False, True])
def test_when_it_is_taken(bias: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By few rows of float32 without a gradient; all others are PyTorch's, to the bit."""
    calls = []
    linear = few_rows.linear

    def counted(x: Any, weight: Any) -> Any:
        calls.append(x.shape)
        return linear(x, weight)

    monkeypatch.setattr(few_rows, "linear", counted)
    weight, b = torch.randn(24, 32), torch.randn(24) if bias else None
    for x in (torch.randn(MAX_ROWS, 32), torch.randn(1, 32)):
        torch.testing.assert_close(portable.linear(x, weight, b), F.linear(x, weight, b))
    assert calls == [(MAX_ROWS, 32), (1, 32)]

    others = [
        (torch.randn(MAX_ROWS + 1, 32), weight, b),
        (torch.randn(0, 32), weight, b),
        (torch.randn(1, 32).requires_grad_(), weight, b),
        (torch.randn(1, 32), weight.clone().requires_grad_(), b),
    ]
    for dtype in (torch.float64, torch.bfloat16):
        others.append(
            (torch.randn(1, 32).to(dtype), weight.to(dtype), b if b is None else b.to(dtype))
        )
    for args in others:
        assert torch.equal(portable.linear(*args), F.linear(*args))
    with torch.autocast("cpu", torch.bfloat16):
        assert portable.linear(torch.randn(1, 32), weight, b).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x = torch.randn(1, 32)
    assert torch.equal(portable.linear(x, weight, b), F.linear(x, weight, b))
    assert len(calls) == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@torch.no_grad()
def test_numbers_that_are_not_finite_stay(number: float, threads: int) -> None:
    x, weight = torch.ones(1, 64), torch.ones(3, 64)
    weight[1, 5] = number
    y = portable.linear(x, weight)[0]
    assert y[0] == y[2] == 64.0 and not y[1].isfinite()
