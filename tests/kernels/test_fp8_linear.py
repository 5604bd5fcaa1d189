"""The linear op in fp8: within bounds that follow from the formats, and what it keeps."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.kernels import fused, reference
from fastgpt.kernels.fp8_products import E4M3, E5M2
from tests.tools import parity
from tests.tools.fp8_cases import (
    HALF,
    layer,
    product_bound,
    results,
    summation,
    uncertainty,
)
from tests.tools.parity import saved_storages

# tokens, features in, features out
SHAPES = [(16, 16, 16), (1, 32, 48), (37, 48, 16), (130, 144, 80), (0, 16, 32)]


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
