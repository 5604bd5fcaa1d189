"""What every test gets: whether the Triton ops take tensors of the CPU."""

import pytest
import torch

from fastgpt.kernels import _common, fused


@pytest.mark.gpu  # it needs none: the marker is what is tested
def test_a_test_for_a_gpu_finds_the_ops_of_production() -> None:
    assert not _common.INTERPRETED
    with pytest.raises(ValueError, match="x must be on a CUDA device, got cpu"):
        fused.gelu(torch.ones(2))


@pytest.mark.parametrize("marked", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_parameter_can_be_for_a_gpu(marked: bool) -> None:
    assert _common.INTERPRETED is not marked


def test_the_fixture_device(device: str) -> None:
    assert _common.INTERPRETED is (device == "cpu")


def test_interpreted_kernels_on_the_cpu() -> None:
    torch.testing.assert_close(fused.gelu(torch.zeros(2)), torch.zeros(2))
