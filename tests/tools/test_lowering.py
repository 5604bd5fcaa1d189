"""Every interpreted launch is lowered to Triton's IR first, specialised as on a GPU."""

import pytest
import torch

from tests.tools import lowering, toy_kernels


@pytest.fixture(autouse=True)
def _nothing_is_lowered_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_lowered", "_launched"):
        monkeypatch.setattr(lowering, name, set())


@pytest.mark.parametrize("large", [2, 16, 2**40])
def test_a_method_of_an_argument_compiles_for_most_numbers(large: int) -> None:
    out = torch.zeros(4, dtype=torch.float64)
    toy_kernels.arguments_kernel[(1,)](out, 0.5, True, None, large)
    assert out[3] == large


def test_a_method_of_an_argument_does_not_compile_for_1() -> None:
    """The launcher passes the kernel the Python number 1, which the interpreter never does."""
    args = torch.zeros(4, dtype=torch.float64), 0.5, True, None
    toy_kernels.arguments_kernel[(1,)](*args, 2)
    for _ in range(2):
        with pytest.raises(
            lowering.LoweringError, match=r"(?s)arguments_kernel.*'large': 1.*large\.to"
        ):
            toy_kernels.arguments_kernel[(1,)](*args, 1)
