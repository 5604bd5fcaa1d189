"""The fp8 mode: the casts to the bit, the ops as PyTorch sees them, and what they refuse."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.kernels import (
    _host,
    fp8_products,
    fused,
    linear,
    linear_cross_entropy,
    reference,
    torch_ops,
)
from fastgpt.kernels.costs import COSTS
from fastgpt.kernels.fp8_products import E4M3, E5M2
from tests.tools import parity
from tests.tools.fp8_cases import head, layer, uncertainty

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


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("module", [fused, torch_ops, reference, ops])
def test_sizes_that_are_no_multiples_of_16(module: Any) -> None:
    x, targets = torch.zeros(4, 24).bfloat16(), torch.zeros(4, dtype=torch.int64)
    message = r"both sizes of weight must be multiples of 16 with fp8=True, got \({}, 24\)"
    with pytest.raises(ValueError, match=message.format(32)):
        module.linear(x, torch.zeros(32, 24), fp8=True)
    with pytest.raises(ValueError, match=message.format(50257)):
        module.linear_cross_entropy(x, torch.zeros(50257, 24), targets, fp8=True)


@pytest.mark.parametrize("module", [fused, torch_ops, reference, ops])
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
    for call in (*calls(torch_ops, torch.bfloat16), *calls(ops, torch.float32)):
        with pytest.raises(ValueError, match="fp8 must be False without .* capability 8.9 .* cpu"):
            call()
    for call in calls(fused, torch.bfloat16):
        with (
            mock.patch.object(_host, "capability", lambda device: 86),
            pytest.raises(ValueError, match="fp8 must be False on a GPU .* below 8.9 .* got 8.6"),
        ):
            call()
