"""The fp8 mode: the casts to the bit, the products within bounds that follow from the formats, and
a model that trains as in float32.

``reference`` rounds to fp8 and multiplies in float32 or float64; the fused ops, interpreted on a
CPU, take PyTorch's scaled products of what the Triton kernels cast.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import _op_bench
import bench_fp8
import bench_linear
import parity
import pytest
import torch
from _ceilings import Ceilings
from parity import saved_storages
from small_models import small_config
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import GPT, ops
from fastgpt.kernels import (
    _common,
    fp8_products,
    fused,
    linear,
    linear_cross_entropy,
    portable,
    reference,
)
from fastgpt.kernels._costs import COSTS
from fastgpt.kernels.fp8_products import E4M3, E5M2

LAYER = {"M": 1024, "K": 768, "N": 2304}

HALF = [torch.bfloat16, torch.float16]

# tokens, features in, features out
SHAPES = [(16, 16, 16), (1, 32, 48), (37, 48, 16), (130, 144, 80), (0, 16, 32)]
LOSS_SHAPES = [(16, 16, 16), (1, 32, 64), (37, 32, 80), (50, 16, 208)]  # rows, width, classes

# Relative to the number, and to the scale: half of the last place, half of the least number.
ROUNDING = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}


@pytest.fixture(autouse=True)
def _needs_fp8(request: pytest.FixtureRequest) -> None:
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cuda":
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("this GPU has no fp8 products")


def uncertainty(x: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """The most by which an element of x, float64, moves when it is cast."""
    relative, absolute = ROUNDING[dtype]
    scale = reference.fp8_scale(x, dtype) if scale is None else scale
    return torch.maximum(relative * x.abs(), absolute * scale)


def product_bound(a: Tensor, a_off: Tensor, b: Tensor, b_off: Tensor) -> Tensor:
    """Of ``a bᵀ``, if the elements of a and b move by as much as ``a_off`` and ``b_off``."""
    return a.abs() @ b_off.t() + a_off @ b.abs().t() + a_off @ b_off.t()


def summation(device: str, terms: int) -> float:
    """Relative to the sum of magnitudes: float32's on the CPU. On Hopper an accumulator keeps 13
    bits or more of what it adds up."""
    return 2.0**-23 * max(1, terms) if device == "cpu" else 2.0**-10


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


def assert_quantised(x: Tensor, dtype: torch.dtype) -> None:
    found = fp8_products.quantise(x, dtype, columns=True, sums=True)
    scale = reference.fp8_scale(x, dtype)
    assert found.scale.shape == (1,) and found.scale.double().equal(scale.view(1))
    assert found.rows is not None and found.columns is not None and found.sums is not None
    expected = reference.fp8_rounded(x, dtype, scale)
    assert (found.rows.float() * found.scale).equal(expected)
    n_rows = x.shape[0]
    assert found.columns.shape == (x.shape[1], -(-n_rows // 16) * 16)
    assert found.columns[:, :n_rows].t().float().equal(found.rows.float())
    assert not found.columns[:, n_rows:].float().any()
    torch.testing.assert_close(found.sums, x.float().sum(0), atol=1e-4, rtol=1e-5)
    alone = fp8_products.quantise(x, dtype, columns=False)
    assert alone.columns is None and alone.rows is not None
    assert alone.rows.view(torch.uint8).equal(found.rows.view(torch.uint8))


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (37, 48), (130, 272), (64, 128)], ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("x_dtype", parity.DTYPES, ids=str)
def test_cast(device: str, shape: Any, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    assert_quantised((3 * torch.randn(shape, device=device)).to(x_dtype), dtype)


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("name", ["zeros", "tiny", "huge", "at the top", "just over"])
def test_cast_at_the_ends_of_the_range(device: str, name: str, dtype: torch.dtype) -> None:
    x = special(name, torch.bfloat16)
    found = fp8_products.quantise(x.to(device), dtype, columns=False)
    assert found.rows is not None
    largest = found.rows.float().abs().amax().item()
    top = torch.finfo(dtype).max
    assert largest <= top and (name in ("zeros", "tiny") or largest >= top / 2)
    assert (
        (found.rows.float() * found.scale)
        .cpu()
        .equal(reference.fp8_rounded(x, dtype, reference.fp8_scale(x, dtype)))
    )


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_scales_are_the_least_powers_of_two(dtype: torch.dtype) -> None:
    for magnitude in (1e-30, 0.3, 1.0, 1.75, 1.7500001, 2.0, 447.9, 448.0, 449.0, 3e38):
        scale = reference.fp8_scale(torch.tensor([magnitude]), dtype).item()
        assert math.log2(scale).is_integer()
        assert torch.tensor(magnitude).item() / scale <= torch.finfo(dtype).max
        assert torch.tensor(magnitude).item() / (scale / 2) > torch.finfo(dtype).max


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_what_is_not_finite_is_not_hidden(device: str, dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(20, 32, device=device).bfloat16()
    x[7, 9] = bad
    found = fp8_products.quantise(x, dtype, columns=True)
    assert found.rows is not None and found.columns is not None
    assert found.scale.isnan().all() and found.rows.float().isnan().all()
    assert found.columns[:, :20].float().isnan().all()
    weight = torch.randn(16, 32, device=device)
    for module in (fused, reference):
        assert module.linear(x, weight, fp8=True).isnan().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_how_far_a_cast_moves_a_number(dtype: torch.dtype) -> None:
    x = torch.randn(100_000).mul(torch.randn(100_000).mul(6).exp2()).double()
    scale = reference.fp8_scale(x, dtype)
    moved = (reference.fp8_rounded(x, dtype, scale) - x).abs()
    allowed = uncertainty(x, dtype)
    assert (moved <= allowed).all()
    assert (moved / allowed).amax() > 0.99  # the bound is no wider than it must be


def test_transpose(device: str) -> None:
    x8 = torch.randn(37, 144, device=device).to(E5M2)
    columns = fp8_products.transposed(x8)
    assert columns.shape == (144, 48) and not columns[:, 37:].float().any()
    assert columns[:, :37].t().float().equal(x8.float())


# ------------------------------------------------------------------------------------ the linear


def layer(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str, layout: str = "contiguous"
) -> tuple[list[Tensor], Tensor]:
    tokens, n_in, n_out = shape
    x = parity.randn((tokens, n_in), dtype, device, layout)
    weight = parity.randn((n_out, n_in), torch.float32, device, layout) * 0.1
    bias = torch.randn(n_out, device=device)
    dy = parity.randn((tokens, n_out), dtype, device, layout) * 1e-3
    return [t.detach().requires_grad_() for t in (x, weight, bias)], dy


def results(op: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    y = op(*leaves)
    return [t.detach() for t in (y, *torch.autograd.grad(y, leaves, dy))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_linear(device: str, shape: Any, dtype: torch.dtype) -> None:
    """Against the emulation, and against exact products within the formats' bound."""
    layout = parity.LAYOUTS[SHAPES.index(shape) % len(parity.LAYOUTS)]
    leaves, dy = layer(shape, dtype, device, layout)
    got = results(partial(fused.linear, fp8=True), leaves, dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    wide[2] = leaves[2].detach().to(dtype).double().requires_grad_()  # added as it is rounded
    emulated = results(partial(reference.linear, fp8=True), wide, dy.double())
    exact = results(reference.linear, wide, dy.double())
    x, weight, bias, dy = (t.detach().double() for t in (*wide, dy))
    x_off, weight_off = uncertainty(x, E4M3), uncertainty(weight, E4M3)
    dy_off = uncertainty(dy, E5M2)
    bounds = [
        product_bound(x, x_off, weight, weight_off),
        product_bound(dy, dy_off, weight.t(), weight_off.t()),
        product_bound(dy.t(), dy_off.t(), x.t(), x_off.t()),
        torch.zeros_like(bias),
    ]
    sums = [
        summation(device, shape[1]) * (x.abs() @ weight.abs().t() + bias.abs()),
        summation(device, shape[2]) * (dy.abs() @ weight.abs()),
        summation(device, shape[0]) * (dy.abs().t() @ x.abs()),
        summation("cpu", shape[0]) * dy.abs().sum(0),
    ]
    names = ("y", "dx", "dweight", "dbias")
    rows = zip(names, got, emulated, exact, bounds, sums, strict=True)
    for name, value, near, truth, bound, summed in rows:
        assert value.shape == truth.shape and not value.isnan().any(), name
        last_place = torch.finfo(value.dtype).eps * value.double().abs()
        if value.dtype == torch.float16:
            last_place += torch.finfo(torch.float16).smallest_normal  # gradients may be subnormal
        assert ((value - near).abs() <= last_place + 4 * summed + bound * 1e-6).all(), name
        assert ((value - truth).abs() <= bound + last_place + 4 * summed).all(), name
    if shape[0] > 1:  # it is fp8, and no more exact than that
        assert (got[0] - exact[0]).norm() > 0.005 * exact[0].norm()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_linear_over_leading_dimensions_and_without_bias(device: str, dtype: torch.dtype) -> None:
    (x, weight, _), dy = layer((30, 32, 48), dtype, device)
    flat = results(partial(fused.linear, fp8=True), [x, weight], dy)
    cube = x.detach().view(2, 3, 5, 32).requires_grad_()
    for a, b in zip(
        results(partial(fused.linear, fp8=True), [cube, weight], dy.view(2, 3, 5, 48)),
        flat,
        strict=True,
    ):
        assert a.reshape(b.shape).equal(b)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_recomputed_linear(device: str, dtype: torch.dtype) -> None:
    """The same bits, and neither x nor its 8 bits among what is kept."""
    source = torch.randn(40, 64, device=device).to(dtype)
    ln_weight, ln_bias = torch.randn(64, device=device), torch.randn(64, device=device)
    _, weight, bias = layer((40, 64, 32), dtype, device)[0]
    dy = torch.randn(40, 32, device=device).to(dtype)
    recipe = (source, ln_weight, ln_bias, 1e-5)
    x = fused.layer_norm(*recipe).to(dtype).requires_grad_()
    kept = results(partial(fused.linear, fp8=True), [x, weight, bias], dy)
    again = results(partial(fused.linear, fp8=True, recompute=recipe), [x, weight, bias], dy)
    assert all(map(torch.equal, kept, again))
    sizes = {
        made: sorted(
            saved_storages(
                partial(fused.linear, x, weight, bias, recompute=made, fp8=True)
            ).values()
        )
        for made in (None, recipe)
    }
    weights, scale = 64 * 32, 4
    assert sizes[None] == sorted([scale, scale, weights, 64 * 48])  # 40 tokens, padded to 48
    assert sizes[recipe] == sorted([scale, weights, *(4 * 64,) * 2, 2 * 40 * 64])


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for(device: str, wanted: tuple[bool, bool]) -> None:
    (x, weight, bias), dy = layer((20, 32, 48), torch.bfloat16, device)
    y, dx, dweight, _ = results(partial(fused.linear, fp8=True), [x, weight, bias], dy)
    for tensor, wants in zip((x, weight, bias), (wanted[0], wanted[1], False), strict=True):
        tensor.requires_grad_(wants)
    with FlopCounterMode(display=False) as counter:
        again = fused.linear(x, weight, bias, fp8=True)
        if any(wanted):
            again.backward(dy)
    assert again.equal(y) and again.requires_grad == any(wanted)
    assert counter.get_total_flops() == (1 + sum(wanted)) * 2 * 20 * 32 * 48
    for leaf, wants, expected in zip((x, weight), wanted, (dx, dweight), strict=True):
        assert (leaf.grad is not None) == wants
        assert leaf.grad is None or leaf.grad.equal(expected)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_their_parameters_dtypes(device: str, weight_dtype: torch.dtype) -> None:
    (x, weight, bias), dy = layer((20, 32, 48), torch.bfloat16, device)
    leaves = [x, *(t.detach().to(weight_dtype).requires_grad_() for t in (weight, bias))]
    y, *gradients = results(partial(fused.linear, fp8=True), leaves, dy)
    assert [t.dtype for t in (y, *gradients)] == [dy.dtype, x.dtype, weight_dtype, weight_dtype]
    loss = fused.linear_cross_entropy(
        x, leaves[1], torch.zeros(20, dtype=torch.int64, device=device), fp8=True
    )
    gradients = [loss, *torch.autograd.grad(loss, leaves[:2])]
    assert [t.dtype for t in gradients] == [torch.float32, x.dtype, weight_dtype]


def test_autocast(device: str) -> None:
    """float32 under autocast is what its 16 bits are."""
    (x, weight, bias), dy = layer((20, 32, 48), torch.float32, device)
    low = [x.detach().bfloat16().requires_grad_(), weight, bias]
    targets = torch.randint(48, (20,), device=device)
    expected = results(partial(fused.linear, fp8=True), low, dy.bfloat16())
    loss = fused.linear_cross_entropy(low[0], weight, targets, fp8=True)
    with torch.autocast(device, torch.bfloat16):
        found = results(partial(fused.linear, fp8=True), [x, weight, bias], dy.bfloat16())
        assert fused.linear_cross_entropy(x, weight, targets, fp8=True).equal(loss)
    assert found[1].dtype == torch.float32
    assert all(a.equal(b.to(a.dtype)) for a, b in zip(found, expected, strict=True))


# -------------------------------------------------------------------------------------- the loss


def head(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor]:
    rows, width, classes = shape
    x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width, device=device) * 0.05).requires_grad_()
    targets = torch.randint(classes, (rows,), device=device)
    targets[1::3] = -1
    return [x, weight], targets


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


# ----------------------------------------------------------------------------- as PyTorch sees it


def test_opcheck(device: str) -> None:
    (x, weight, bias), dy = layer((20, 32, 48), torch.bfloat16, device)
    recipe = (x.detach(), torch.ones(32, device=device), None, 1e-5)
    no_recipe = (None, None, None, 0.0)
    for made, keeps in (
        (no_recipe, (True, True)),
        (recipe, (False, True)),
        (no_recipe, (False,) * 2),
    ):
        args = (x, weight, bias) if any(keeps) else (x.detach(), weight.detach(), None)
        torch.library.opcheck(linear._linear_fp8_op, (*args, *made, *keeps))
    _, *kept = linear._linear_fp8_op(x.detach(), weight.detach(), None, *no_recipe, True, True)
    for saved, source in ((kept, no_recipe), ([None, None, *kept[2:]], recipe)):
        args = (dy, *saved, *source, torch.float32, True, True)
        torch.library.opcheck(linear._linear_fp8_bwd_op, args)
    (x, weight), targets = head((20, 16, 32), torch.bfloat16, device)
    op: Any = linear_cross_entropy._linear_cross_entropy_fp8_op
    torch.library.opcheck(op, (x, weight, targets, torch.bfloat16, -1, True, 0.1, 0.0, True, True))


def model_in_fp8(fp8: str, device: str = "cpu", **options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(small_config(vocab_size=80), fp8=fp8, **options).to(device)


def batch(device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(80, (2, 17), generator=generator).to(device)
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(model: GPT, device: str, run: Any = None) -> list[Tensor]:
    with torch.autocast(device, torch.bfloat16):
        loss = (model if run is None else run)(*batch(device))[1]
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fp8", ["head", "all"])
def test_compiled_whole(device: str, fp8: str, recompute: bool) -> None:
    model = model_in_fp8(fp8, device, ops=fused, recompute=recompute)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = loss_and_gradients(model, device)
    assert all(map(torch.equal, loss_and_gradients(model, device, compiled), eager))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        model = GPT(small_config(vocab_size=80), ops=fused, fp8="all")
        for value, parameter in zip(
            loss_and_gradients(model, "cpu")[1:], model.parameters(), strict=True
        ):
            assert value.shape == parameter.shape and value.dtype == parameter.dtype


@pytest.mark.parametrize("fp8", ["none", "head", "all"])
def test_flops_are_those_of_bf16(fp8: str) -> None:
    counts = []
    for which in ("none", fp8):
        model = model_in_fp8(which, ops=fused)
        with FlopCounterMode(display=False) as counter:
            loss_and_gradients(model, "cpu")
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("fp8", ["head", "all"])
def test_model(device: str, fp8: str) -> None:
    """As near to its emulation as half precision is to float32, and not the bf16 model."""
    got = loss_and_gradients(model_in_fp8(fp8, device, ops=fused), device)
    near = loss_and_gradients(model_in_fp8(fp8, device, ops=reference), device)
    other = loss_and_gradients(model_in_fp8("none", device, ops=fused), device)
    assert (got[0] - near[0]).abs() <= 2e-3
    assert not got[0].equal(other[0])
    for value, emulated in zip(got[1:], near[1:], strict=True):
        assert (value - emulated).norm() <= 0.1 * emulated.norm()


def test_the_attribute_changes_the_next_step_and_no_logits(device: str) -> None:
    model = model_in_fp8("none", device, ops=fused)
    plain = loss_and_gradients(model, device)
    for fp8 in ("head", "all"):
        model.fp8 = fp8
        changed = loss_and_gradients(model, device)
        assert all(
            map(
                torch.equal,
                changed,
                loss_and_gradients(model_in_fp8(fp8, device, ops=fused), device),
            )
        )
        assert not changed[0].equal(plain[0])
    model.fp8 = "none"
    assert all(map(torch.equal, plain, loss_and_gradients(model, device)))
    model.eval()
    logits = []
    for fp8 in ("none", "head"):
        model.fp8 = fp8
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            logits.append(model(batch(device)[0])[0])
    assert logits[0].equal(logits[1])


# Decided before the first run: over the last 10 of 50 steps the mean loss may differ from float32's
# by this share of what float32 has learnt by then.
SHARE = {"head": 0.03, "all": 0.06}


def curve(fp8: str) -> list[float]:
    """Losses of a model that learns to continue arithmetic sequences."""
    model = model_in_fp8(fp8, ops=reference)
    optimizer = model.configure_optimizers(0.1, 3e-3, (0.9, 0.95), "cpu")
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(50):
        start, step = (torch.randint(n, (16, 1), generator=generator) for n in (80, 4))
        ids = (start + step * torch.arange(17)) % 80
        loss = model(ids[:, :-1], ids[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_follows_float32() -> None:
    plain = curve("none")
    learnt = plain[0] - sum(plain[-10:]) / 10
    assert learnt > 1.0
    for fp8, share in SHARE.items():
        losses = curve(fp8)
        assert all(map(math.isfinite, losses)) and losses != plain
        assert abs(sum(losses[-10:]) - sum(plain[-10:])) / 10 <= share * learnt, fp8


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("module", [fused, portable, reference, ops])
def test_sizes_that_are_no_multiples_of_16(module: Any) -> None:
    x, targets = torch.zeros(4, 24).bfloat16(), torch.zeros(4, dtype=torch.int64)
    message = r"both sizes of weight must be multiples of 16 with fp8=True, got \({}, 24\)"
    with pytest.raises(ValueError, match=message.format(32)):
        module.linear(x, torch.zeros(32, 24), fp8=True)
    with pytest.raises(ValueError, match=message.format(50257)):
        module.linear_cross_entropy(x, torch.zeros(50257, 24), targets, fp8=True)


@pytest.mark.parametrize("module", [fused, portable, reference, ops])
def test_z_loss_is_refused(module: Any) -> None:
    x, targets = torch.zeros(4, 16).bfloat16(), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"z_loss must be 0 with fp8=True, got 0\.1"):
        module.linear_cross_entropy(x, torch.zeros(32, 16), targets, z_loss=0.1, fp8=True)


def calls(module: Any, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    x, weight = torch.zeros(4, 16, dtype=dtype), torch.zeros(32, 16)
    targets = torch.zeros(4, dtype=torch.int64)
    return [
        partial(module.linear, x, weight, fp8=True),
        partial(module.linear_cross_entropy, x, weight, targets, fp8=True),
    ]


def test_what_has_no_fp8() -> None:
    message = "x must be float16 or bfloat16 with fp8=True.*got torch.float32"
    for call in calls(fused, torch.float32):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (*calls(portable, torch.bfloat16), *calls(ops, torch.float32)):
        with pytest.raises(ValueError, match="fp8 must be False without .* capability 8.9 .* cpu"):
            call()
    for call in calls(fused, torch.bfloat16):
        with (
            mock.patch.object(_common, "capability", lambda device: 86),
            pytest.raises(ValueError, match="fp8 must be False on a GPU .* below 8.9 .* got 8.6"),
        ):
            call()


def test_models_that_cannot_have_it() -> None:
    with pytest.raises(ValueError, match="fp8 must be 'none', 'head' or 'all', got 'mlp'"):
        GPT(small_config(), fp8="mlp")
    with pytest.raises(ValueError, match="vocab_size must be a multiple of 16 .* 65: .* to 128"):
        GPT(small_config(), fp8="head")
    with pytest.raises(ValueError, match="vocab_size must be .* got 50257: pad it, to 50304 say"):
        GPT(small_config(vocab_size=50257), fp8="head")
    with pytest.raises(ValueError, match="n_embd must be a multiple of 16 .* got 24: .* to 64"):
        GPT(small_config(vocab_size=80, n_embd=24), fp8="all")
    model = GPT(small_config())
    with pytest.raises(ValueError, match="vocab_size must be a multiple of 16"):
        model.fp8 = "head"
    assert model.fp8 == "none"
    model = model_in_fp8("head")
    with pytest.raises(ValueError, match="it needs a CUDA GPU of compute capability 8.9"):
        model(*batch())


# --------------------------------------------------------------------------------- the benchmark


@pytest.mark.parametrize("provider", ["fp8", "bf16"])
@pytest.mark.parametrize("op", ["LINEAR", "LOSS"])
def test_benchmark_checks_what_it_times(
    op: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = getattr(bench_fp8, op)
    sizes = {name: 48 for name in chosen.gpu_sizes[0]}
    row = _op_bench.Row(chosen, tuple(sizes.items()), chosen.directions[-1], provider)
    inputs = chosen.inputs(_op_bench.Draw(torch.device("cpu"), torch.bfloat16), **sizes)
    bench_fp8.check(row, inputs)
    other = {"fp8": "bf16", "bf16": "fp8"}[provider]
    wrong = chosen.function(other)
    monkeypatch.setattr(bench_fp8.Fp8Op, "function", lambda self, provider: wrong)
    with pytest.raises(AssertionError, match="deviates by"):
        bench_fp8.check(row, inputs)


def test_benchmark_counts_products_at_twice_the_rate() -> None:
    found = [
        _op_bench.cost(op, tuple(LAYER.items()), "forward", torch.bfloat16, ceilings)
        for op, ceilings in (
            (bench_fp8.LINEAR, Ceilings("", 1.0, 1e9)),
            (bench_linear.OP, Ceilings("", 1.0, 1e9)),
        )
    ]
    assert found[0].flops == found[1].flops == 2 * math.prod(LAYER.values())
    assert 2 * found[0].ms == pytest.approx(found[1].ms)


def test_bytes_by_hand(device: str) -> None:
    """x and weight are read twice, written along rows and columns, and read by the product."""
    (x, weight, _), dy = layer((32, 16, 48), torch.bfloat16, device)
    args = (x.detach(), weight.detach(), None, None, None, None, 0.0, True, True)
    out = linear._linear_fp8_op(*args)
    kernels = COSTS[torch.ops.fastgpt.linear_fp8](out, *args)
    assert {k.name: (k.bytes, k.fp8) for k in kernels} == {
        "x maximum": (2 * 32 * 16, False),
        "x to fp8": (4 * 32 * 16, False),
        "weight maximum": (4 * 48 * 16, False),
        "weight to fp8": (6 * 48 * 16, False),
        "linear": (32 * 16 + 48 * 16 + 2 * 32 * 48, True),
    }
    args = (dy, *out[1:], None, None, None, 0.0, torch.float32, True, True)
    kernels = COSTS[torch.ops.fastgpt.linear_fp8_bwd](linear._linear_fp8_bwd_op(*args), *args)
    assert {k.name: (k.bytes, k.fp8) for k in kernels} == {
        "dy maximum": (2 * 32 * 48, False),
        "dy to fp8": (4 * 32 * 48, False),
        "linear dx": (32 * 48 + 48 * 16 + 2 * 32 * 16, True),
        "dweight": (32 * 48 + 32 * 16 + 4 * 48 * 16, True),
    }
