"""GELU in Triton against the plain op: parity, gradients, operator registration."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, ones

from fastgpt.kernels import fused, reference, torch_ops
from tests.tools import parity
from tests.tools.calls import Call, Cases, compare, compiled
from tests.tools.draws import Drawn, Draws

SHAPES = [(1,), (7,), (1024,), (3, 1025), (0,), (5, 0, 2), (2, 3, 65), (129, 80)]
FORMS = ["none", "tanh"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parity(device: str, shape: tuple[int, ...], dtype: torch.dtype, form: str) -> None:
    layout = parity.LAYOUTS[SHAPES.index(shape) % len(parity.LAYOUTS)]
    x = parity.randn(shape, dtype, device, layout)
    kernel, pytorch, plain = (
        partial(module.gelu, approximate=form) for module in (fused, torch_ops, reference)
    )
    parity.assert_parity(
        kernel, pytorch, plain, [x], parity.randn(shape, dtype, device, "transposed"), ["x"]
    )


@pytest.mark.parametrize("form", FORMS)
def test_tails_and_special_values(device: str, form: str) -> None:
    x = torch.tensor([-1e4, -40.0, -9.0, -1e-20, 0.0, 1e-20, 9.0, 40.0, 1e4], device=device)
    x.requires_grad_()
    y = fused.gelu(x, form)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y[:2], torch.zeros(2, device=device))
    assert torch.equal(y[-2:], x[-2:])
    assert torch.equal(dx[[0, 4, 8]], torch.tensor([0.0, 0.5, 1.0], device=device))
    assert fused.gelu(torch.tensor([float("nan")], device=device), form).isnan().all()


# --------------------------------------------------------------------- the checks of every op


def _plain(ops: Any, x: Tensor) -> Tensor:
    return ops.gelu(x)


def _tanh(ops: Any, x: Tensor) -> Tensor:
    return ops.gelu(x, "tanh")


def _drawn(draws: Draws) -> Drawn:
    form, x = draws.one_of(*FORMS), draws.tensor(*draws.outer(), draws.size(70))
    return lambda ops, x: ops.gelu(x, form), [x]


GELU = Cases(
    "gelu",
    valid=dict(x=ones(3)),
    refused={"approximate must be 'none' or 'tanh', got 'fast'": dict(approximate="fast")},
    compiled=[
        compiled("gelu-tanh-float32", compare, _tanh, torch.float32, (2, 3000)),
        compiled("gelu-none-float32", compare, _plain, torch.float32, (2, 3000)),
        compiled("gelu-none-float16", compare, _plain, torch.float16, (2, 3000)),
        compiled("gelu-tanh-bfloat16", compare, _tanh, torch.bfloat16, (2, 3000)),
    ],
    calls={"": Call([(5, 33)], _plain, empty=[[(0, 33)], [(5, 0)], [(0,)]], single=[(1, 1)])},
    variants={"tanh": Call([(5, 33)], _tanh)},
    drawn=_drawn,
)
