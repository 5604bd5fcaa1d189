"""GELU in Triton against the plain op: parity, gradients, operator registration."""

from functools import partial

import pytest
import torch

from fastgpt.kernels import fused, reference, torch_ops
from tests.tools import parity

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


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    x = torch.randn(2, 17, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(fused.gelu, approximate=form), (x,))
