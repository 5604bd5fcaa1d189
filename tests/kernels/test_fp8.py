"""The fp8 mode: casts bit for bit, head and loss within bounds derived from the formats.

``reference`` rounds to fp8 and multiplies in float32 or float64; the fused ops, interpreted on a
CPU, cast with the Triton kernels and use PyTorch's scaled matrix products.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import ops
from fastgpt.kernels import (
    _host,
    fp8_products,
    fused,
    linear_cross_entropy,
    reference,
    torch_ops,
)
from fastgpt.kernels.costs import COSTS
from fastgpt.kernels.fp8_products import E4M3, E5M2
from tests.tools import parity
from tests.tools.fp8_cases import needs_fp8  # noqa: F401

HALF = [torch.bfloat16, torch.float16]

# Half an ulp relative to the value; half of the smallest subnormal relative to the scale.
ROUNDING = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}


def uncertainty(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """Bound on the rounding error of each element of x (float64) in the cast."""
    relative, absolute = ROUNDING[dtype]
    scale = reference.fp8_scale(x) if scale is None else scale
    return torch.maximum(relative * x.abs(), absolute * scale)


def product_bound(a: Tensor, a_off: Tensor, b: Tensor, b_off: Tensor) -> Tensor:
    """Error bound of ``a bᵀ`` if elements of a and b are off by up to ``a_off`` and ``b_off``."""
    return a.abs() @ b_off.t() + a_off @ b.abs().t() + a_off @ b_off.t()


def head(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor]:
    rows, width, classes = shape
    x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width, device=device) * 0.05).requires_grad_()
    targets = torch.randint(classes, (rows,), device=device)
    targets[1::3] = -1
    return [x, weight], targets


# ------------------------------------------------------------------------------------- the casts


def special(name: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(24, 40).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal
    values = {
        "zeros": 0.0,
        "tiny": tiny,
        "huge": torch.finfo(dtype).max,
        "at the top": 1.75 * 2.0**-3,
        "just over": 1.75 * 2.0**-3 * (1 + torch.finfo(dtype).eps),
    }
    x = x / x.abs().amax() * values[name]
    x[3, 5] = -values[name]
    return x.to(dtype)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (37, 48), (130, 272), (64, 128)], ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_cast(device: str, shape: Any, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(shape, device=device)).to(dtype)
    found = fp8_products.quantise(x, columns=True)
    scale = reference.fp8_scale(x)
    assert found.scale.shape == (1,) and found.scale.double().equal(scale.view(1))
    assert found.columns is not None
    assert (found.rows.float() * found.scale).equal(reference.fp8_rounded(x, E4M3, scale))
    n_rows = x.shape[0]
    assert found.columns.shape == (x.shape[1], -(-n_rows // 16) * 16)
    assert found.columns[:, :n_rows].t().float().equal(found.rows.float())
    assert not found.columns[:, n_rows:].float().any()
    alone = fp8_products.quantise(x, columns=False)
    assert alone.columns is None
    assert alone.rows.view(torch.uint8).equal(found.rows.view(torch.uint8))


@pytest.mark.parametrize("name", ["zeros", "tiny", "huge", "at the top", "just over"])
def test_cast_at_the_ends_of_the_range(device: str, name: str) -> None:
    x = special(name, torch.bfloat16)
    found = fp8_products.quantise(x.to(device), columns=False)
    largest = found.rows.float().abs().amax().item()
    assert largest <= 448 and (name in ("zeros", "tiny") or largest >= 448 / 2)
    expected = reference.fp8_rounded(x, E4M3, reference.fp8_scale(x))
    assert (found.rows.float() * found.scale).cpu().equal(expected)


def test_scales_are_the_least_powers_of_two() -> None:
    for magnitude in (1e-30, 0.3, 1.0, 1.75, 1.7500001, 2.0, 447.9, 448.0, 449.0, 3e38):
        x = torch.tensor([magnitude])
        scale = reference.fp8_scale(x).item()
        assert math.log2(scale).is_integer()
        assert x.item() / scale <= 448 < x.item() / (scale / 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(device: str, bad: float) -> None:
    x = torch.randn(20, 32, device=device).bfloat16()
    x[7, 9] = bad
    found = fp8_products.quantise(x, columns=True)
    assert found.columns is not None
    assert found.scale.isnan().all() and found.rows.float().isnan().all()
    assert found.columns[:, :20].float().isnan().all()
    weight = torch.randn(32, 32, device=device)
    targets = torch.zeros(20, dtype=torch.int64, device=device)
    for module in (fused, reference):
        assert module.linear_cross_entropy(x, weight, targets, fp8=True).isnan()
        loss = module.linear_cross_entropy(
            weight[:20].bfloat16(), x[:16].float(), targets, fp8=True
        )
        assert loss.isnan()  # bad value in the weight


def test_transpose(device: str) -> None:
    x8 = torch.randn(37, 144, device=device).to(E5M2)
    columns = fp8_products.transposed(x8)
    assert columns.shape == (144, 48) and not columns[:, 37:].float().any()
    assert columns[:, :37].t().float().equal(x8.float())


# -------------------------------------------------------------------------------------- the loss


LOSS_SHAPES = [(16, 16, 16), (1, 32, 64), (37, 32, 80), (50, 16, 208)]  # rows, width, classes


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "_fp8_chunk_rows", lambda *_: 16)


@pytest.mark.usefixtures("_small_chunks")
@pytest.mark.parametrize("shape", LOSS_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_loss(device: str, shape: Any, dtype: torch.dtype, label_smoothing: float) -> None:
    """Against the emulation, and against exact products within a bound: if the logits of a row are
    off by at most d, its loss is off by at most 2 d (logit d, log-sum-exp d) and each p by a
    factor between exp(-2 d) and exp(2 d)."""
    leaves, targets = head(shape, dtype, device)
    n_valid = int((targets != -1).sum())
    options: dict[str, Any] = dict(targets=targets, label_smoothing=label_smoothing)
    grad = torch.tensor(1.0, device=device)
    got = parity.outcome(partial(fused.linear_cross_entropy, fp8=True, **options), leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    emulated, exact = (
        parity.outcome(
            partial(reference.linear_cross_entropy, fp8=fp8, **options), wide, grad.double()
        )
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
    slack = 1 + 2**-8 + 4 * last_place  # fp32 sums, rounded gradient
    bounds = [
        2 * (d * valid).sum() / n_valid,
        slack * product_bound(dlogits, off, weight.t(), weight_off.t()) / n_valid,
        slack * product_bound(dlogits.t(), off.t(), x.t(), x_off.t()) / n_valid,
    ]
    names = ("loss", "dx", "dweight")
    for name, value, near, truth, bound in zip(names, got, emulated, exact, bounds, strict=True):
        assert value.shape == truth.shape and not value.isnan().any(), name
        # the float64 emulation does not round logits to half precision, so a gradient halfway
        # between two e5m2 values may round the other way
        assert (value - near).norm() <= 0.03 * near.norm() + 1e-5, name
        tiny = torch.finfo(torch.float16).smallest_normal if dtype == torch.float16 else 0.0
        excess = (value - truth).abs() - bound - last_place * value.abs() - tiny - 1e-6
        assert (excess <= 0).all(), (name, excess.amax())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_its_emulation_round_alike(device: str, reduction: str) -> None:
    leaves, targets = head((48, 32, 80), torch.bfloat16, device)
    grad = torch.tensor(0.5, device=device)
    got, near = (
        parity.outcome(
            partial(m.linear_cross_entropy, targets=targets, reduction=reduction, fp8=True),
            leaves,
            grad,
        )
        for m in (fused, reference)
    )
    assert (got[0] - near[0]).abs() <= 1e-5 * near[0]
    # different float32 exp: about one of thousands of dlogits rounds to another fp8 value
    torch.testing.assert_close(got[1], near[1], atol=0, rtol=0.02)
    assert (got[2] - near[2]).norm() <= 2e-3 * near[2].norm()


def test_chunks_change_only_the_order_of_sums(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, targets = head((50, 32, 80), torch.bfloat16, device)
    op = partial(fused.linear_cross_entropy, targets=targets, fp8=True)
    grad = torch.tensor(1.0, device=device)
    *whole, whole_dweight = parity.outcome(op, leaves, grad)
    monkeypatch.setattr(linear_cross_entropy, "_fp8_chunk_rows", lambda *_: 16)
    *chunks, dweight = parity.outcome(op, leaves, grad)
    torch.testing.assert_close(chunks, whole, atol=1e-7, rtol=1e-5)
    # Hopper's tensor cores add 32 products at once, each truncated some 13 bits below the largest;
    # 2^-11.6 was seen on an H200.
    cut = 2.0**-9 * float(whole_dweight.abs().max()) if device == "cuda" else 1e-7
    torch.testing.assert_close(dweight, whole_dweight, atol=cut, rtol=1e-5)


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


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradients_that_are_asked_for(device: str, wanted: tuple[bool, bool]) -> None:
    leaves, targets = head((20, 32, 48), torch.bfloat16, device)
    expected = parity.outcome(
        partial(fused.linear_cross_entropy, targets=targets, fp8=True),
        leaves,
        torch.tensor(1.0, device=device),
    )
    alone = [x.detach().requires_grad_(wants) for x, wants in zip(leaves, wanted, strict=True)]
    with FlopCounterMode(display=False) as counter:
        loss = fused.linear_cross_entropy(alone[0], alone[1], targets, fp8=True)
        loss.backward()
    assert loss.equal(expected[0])
    assert counter.get_total_flops() == 2 * 2 * 20 * 32 * 48
    for leaf, wants, gradient in zip(alone, wanted, expected[1:], strict=True):
        assert (leaf.grad is not None) == wants
        assert leaf.grad is None or leaf.grad.equal(gradient)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_their_parameters_dtypes(device: str, weight_dtype: torch.dtype) -> None:
    (x, weight), targets = head((20, 32, 48), torch.bfloat16, device)
    leaves = [x, weight.detach().to(weight_dtype).requires_grad_()]
    loss = fused.linear_cross_entropy(x, leaves[1], targets, fp8=True)
    found = [loss, *torch.autograd.grad(loss, leaves)]
    assert [t.dtype for t in found] == [torch.float32, x.dtype, weight_dtype]


def test_autocast(device: str) -> None:
    """float32 input under autocast equals the same input in bfloat16."""
    (x, weight), targets = head((20, 32, 48), torch.float32, device)
    loss = fused.linear_cross_entropy(x.bfloat16(), weight, targets, fp8=True)
    with torch.autocast(device, torch.bfloat16):
        assert fused.linear_cross_entropy(x, weight, targets, fp8=True).equal(loss)


def test_opcheck(device: str) -> None:
    (x, weight), targets = head((20, 16, 32), torch.bfloat16, device)
    op: Any = linear_cross_entropy._linear_cross_entropy_fp8_op
    torch.library.opcheck(op, (x, weight, targets, torch.bfloat16, -1, True, 0.1, 0.0, True, True))


@pytest.mark.usefixtures("_small_chunks")
def test_bytes_by_hand(device: str) -> None:
    """x and weight: read twice (maximum, cast), written, transposed, read by the products."""
    (x, weight), targets = head((32, 16, 48), torch.bfloat16, device)
    args = (x, weight, targets, torch.bfloat16, -1, True, 0.0, 0.0, True, True)
    op: Any = linear_cross_entropy._linear_cross_entropy_fp8_op
    kernels = COSTS["fastgpt.linear_cross_entropy_fp8"](op(*args), *args)
    rows, cells, weights = 32 * 16, 32 * 48, 48 * 16  # in two chunks of 16 rows
    assert {k.name: (k.bytes, k.fp8) for k in kernels} == {
        "x maximum": (2 * rows, False),
        "x to fp8": (3 * rows, False),
        "x transposed": (2 * rows, False),
        "weight maximum": (4 * weights, False),
        "weight to fp8": (5 * weights, False),
        "weight transposed": (2 * weights, False),
        "logits": (rows + 2 * weights + 2 * cells, True),
        "rows": (3 * cells + 8 * 32, False),
        "dx": (cells + 2 * weights + 6 * rows, True),
        "dlogits transposed": (2 * cells, False),
        "dweight": (cells + rows + 2 * 4 * weights, True),
        "sum of dweight": (3 * 4 * weights, False),
    }


# ------------------------------------------------------------------------------------- bad input


def test_what_has_no_fp8() -> None:
    weight, targets = torch.zeros(32, 16), torch.zeros(4, dtype=torch.int64)

    def refused(module: Any, dtype: torch.dtype, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            module.linear_cross_entropy(torch.zeros(4, 16, dtype=dtype), weight, targets, fp8=True)

    refused(fused, torch.float32, "x must be float16 or bfloat16 with fp8=True.*got torch.float32")
    for module, dtype in ((torch_ops, torch.bfloat16), (ops, torch.float32)):
        refused(module, dtype, "fp8 must be False without .* capability 8.9 .* cpu")
    with _host.interpreted(capability=86):
        refused(fused, torch.bfloat16, "fp8 must be False on a GPU .* below 8.9 .* got 8.6")
