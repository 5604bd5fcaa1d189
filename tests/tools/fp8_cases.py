"""Requirements of the fp8 tests: PyTorch's scaled products on the CPU, a GPU with fp8."""

from typing import Any

import pytest
import torch
from torch import Tensor


def _scaled_mm(
    a: Tensor,
    b: Tensor,
    scales_a: list[Tensor],
    recipe_a: Any,
    swizzle_a: Any,
    scales_b: list[Tensor],
    recipe_b: Any,
    swizzle_b: Any,
    bias: None,
    dtype: torch.dtype | None,
    *_: Any,
) -> Tensor:
    return ((a.float() @ b.float()) * (scales_a[0] * scales_b[0])).to(dtype)


# PyTorch 2.11 has F.scaled_mm's operator only for CUDA. Registered for the rest of the process.
if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_scaled_mm_v2", "CPU"):
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("_scaled_mm_v2", _scaled_mm, "CPU")


@pytest.fixture(autouse=True)
def needs_fp8(request: pytest.FixtureRequest) -> None:
    """Applies to every test of a file that imports it."""
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cuda":
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("this GPU has no fp8 products")
