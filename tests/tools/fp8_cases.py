"""What the tests of the fp8 mode share: inputs, and bounds that follow from the formats.

``reference`` rounds to fp8 and multiplies in float32 or float64; the fused ops, interpreted on a
CPU, take PyTorch's scaled products of what the Triton kernels cast.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import reference
from fastgpt.kernels.fp8_products import E4M3, E5M2
from tests.tools import parity

HALF = [torch.bfloat16, torch.float16]

# Relative to the number, and to the scale: half of the last place, half of the least number.
ROUNDING = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scales_a: list[Tensor],
    recipe_a: Any,
    swizzle_a: Any,
    scales_b: list[Tensor],
    recipe_b: Any,
    swizzle_b: Any,
    bias: Tensor | None,
    dtype: torch.dtype | None,
    *_: Any,
) -> Tensor:
    product = (a.float() @ b.float()) * (scales_a[0] * scales_b[0])
    return (product if bias is None else product + bias).to(dtype)


# PyTorch 2.11 has the operator behind F.scaled_mm for CUDA alone; for the life of the process.
if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"):
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("_scaled_mm_v2", _scaled_mm, "CPU")


@pytest.fixture(autouse=True)
def needs_fp8(request: pytest.FixtureRequest) -> None:
    """For every test of a file that imports it."""
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


def head(
    shape: tuple[int, int, int], dtype: torch.dtype, device: str
) -> tuple[list[Tensor], Tensor]:
    rows, width, classes = shape
    x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width, device=device) * 0.05).requires_grad_()
    targets = torch.randint(classes, (rows,), device=device)
    targets[1::3] = -1
    return [x, weight], targets
