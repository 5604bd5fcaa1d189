"""The head and its loss in fp8: within bounds that follow from the formats."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from fastgpt.kernels import fused, linear_cross_entropy, reference
from fastgpt.kernels.fp8_products import E4M3, E5M2
from tests.tools.fp8_cases import HALF, head, product_bound, results, uncertainty

LOSS_SHAPES = [(16, 16, 16), (1, 32, 64), (37, 32, 80), (50, 16, 208)]  # rows, width, classes


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_fp8_chunk_rows", lambda *_: 16)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_loss(device: str, shape: Any, dtype: torch.dtype, label_smoothing: float) -> None:
    """Against the emulation; against exact products within a bound. With d the most by which a
    logit of a row moves, its loss moves by 2 d at most (a logit by d, the log-sum-exp by d) and
    each p by a factor between exp(-2 d) and exp(2 d)."""
    leaves, targets = head(shape, dtype, device)
    n_valid = int((targets != -1).sum())
    options: dict[str, Any] = dict(targets=targets, label_smoothing=label_smoothing)
    grad = torch.tensor(1.0, device=device)
    got = results(partial(fused.linear_cross_entropy, fp8=True, **options), leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    emulated, exact = (
        results(partial(reference.linear_cross_entropy, fp8=fp8, **options), wide, grad.double())
        for fp8 in (True, False)
    )
    x, weight = (t.detach() for t in wide)
    x_off, weight_off = uncertainty(x, E4M3), uncertainty(weight, E4M3)
    logits = x @ weight.t()
    last_place = torch.finfo(dtype).eps
    d = product_bound(x, x_off, weight, weight_off) + last_place * (logits.abs() + 0.5)
    d = d.amax(1, keepdim=True)
    p = torch.softmax(logits, -1)
    classes = shape[2]
    hot = torch.nn.functional.one_hot(targets.clamp(min=0), classes).double()
    valid = (targets != -1)[:, None]
    dlogits = (p - (1 - label_smoothing) * hot - label_smoothing / classes) * valid
    moved = p * (torch.exp(2 * d) - 1) * valid
    largest = dlogits.abs() + moved
    off = moved + uncertainty(largest, E5M2, largest.new_tensor(2.0**-15))
    slack = 1 + 2**-8 + 4 * last_place  # fp32 sums; the gradient is rounded
    bounds = [
        2 * (d * valid).sum() / n_valid,
        slack * product_bound(dlogits, off, weight.t(), weight_off.t()) / n_valid,
        slack * product_bound(dlogits.t(), off.t(), x.t(), x_off.t()) / n_valid,
    ]
    names = ("loss", "dx", "dweight")
    for name, value, near, truth, bound in zip(names, got, emulated, exact, bounds, strict=True):
        assert value.shape == truth.shape and not value.isnan().any(), name
        # the emulation in float64 does not round the logits to half precision: a gradient that
        # lies between two numbers of e5m2 may go the other way
        assert (value - near).norm() <= 0.03 * near.norm() + 1e-5, name
        tiny = torch.finfo(torch.float16).smallest_normal if dtype == torch.float16 else 0.0
        excess = (value - truth).abs() - bound - last_place * value.abs() - tiny - 1e-6
        assert (excess <= 0).all(), (name, excess.amax())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_its_emulation_round_alike(device: str, reduction: str) -> None:
    leaves, targets = head((48, 32, 80), torch.bfloat16, device)
    grad = torch.tensor(0.5, device=device)
    got, near = (
        results(
            partial(m.linear_cross_entropy, targets=targets, reduction=reduction, fp8=True),
            leaves,
            grad,
        )
        for m in (fused, reference)
    )
    assert (got[0] - near[0]).abs() <= 1e-5 * near[0]
    # float32 exponentials of two kinds: one in thousands of dlogits falls on another number
    torch.testing.assert_close(got[1], near[1], atol=0, rtol=0.02)
    assert (got[2] - near[2]).norm() <= 2e-3 * near[2].norm()


def test_chunks_change_only_the_order_of_sums(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, targets = head((50, 32, 80), torch.bfloat16, device)
    op = partial(fused.linear_cross_entropy, targets=targets, fp8=True)
    grad = torch.tensor(1.0, device=device)
    whole = results(op, leaves, grad)
    monkeypatch.setattr(linear_cross_entropy, "_fp8_chunk_rows", lambda *_: 16)
    for a, b in zip(results(op, leaves, grad), whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_loss_without_rows_without_gradients_and_with_wrong_targets(device: str) -> None:
    (x, weight), targets = head((20, 16, 32), torch.bfloat16, device)
    with torch.no_grad():
        alone = fused.linear_cross_entropy(x, weight, targets, fp8=True)
    assert alone.equal(fused.linear_cross_entropy(x, weight, targets, fp8=True))
    nothing = fused.linear_cross_entropy(x[:0], weight, targets[:0], reduction="sum", fp8=True)
    nothing.backward()
    assert nothing.item() == 0 and weight.grad is not None and not weight.grad.any()
    assert (
        reference.linear_cross_entropy(x[:0], weight, targets[:0], reduction="sum", fp8=True).item()
        == 0
    )
    targets[3] = 32
    loss = fused.linear_cross_entropy(x, weight, targets, fp8=True)
    assert loss.isnan() and torch.autograd.grad(loss, x)[0][3].isnan().all()


@pytest.mark.parametrize("place", ["x", "weight"])
def test_a_nan_reaches_the_loss(device: str, place: str) -> None:
    (x, weight), targets = head((20, 16, 32), torch.bfloat16, device)
    with torch.no_grad():
        (x if place == "x" else weight)[2, 3] = math.nan
    for module in (fused, reference):
        assert module.linear_cross_entropy(x, weight, targets, fp8=True).isnan()
