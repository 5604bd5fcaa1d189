"""conftest.py: whether the Triton ops accept CPU tensors; and ``broken_gpu``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.kernels import _host, fused


@pytest.mark.gpu  # needs no GPU: this tests the marker
def test_a_test_for_a_gpu_finds_the_ops_of_production() -> None:
    assert not _host.INTERPRETED
    with pytest.raises(ValueError, match="x must be on a CUDA device, got cpu"):
        fused.gelu(torch.ones(2))


@pytest.mark.parametrize("marked", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_parameter_can_be_for_a_gpu(marked: bool) -> None:
    assert _host.INTERPRETED is not marked


def test_the_fixture_device(device: str) -> None:
    assert _host.INTERPRETED is (device == "cpu")


def test_interpreted_kernels_on_the_cpu() -> None:
    torch.testing.assert_close(fused.gelu(torch.zeros(2)), torch.zeros(2))


@pytest.mark.parametrize("turn", ["first", "second"])
def test_float32_products_are_exact_whatever_ran_before(turn: str) -> None:
    assert torch.backends.cuda.matmul.allow_tf32 is False
    torch.backends.cuda.matmul.allow_tf32 = True


BREAKING = """
import pytest

@pytest.mark.gpu
def test_breaks_the_gpu():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_shows_what_another_process_said():
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

@pytest.mark.gpu
def test_runs_out_of_memory():
    raise RuntimeError("CUDA error: out of memory")

def test_comes_last():
    pass
"""


def test_a_worker_whose_gpu_is_broken_ends(tmp_path: Path) -> None:
    (tmp_path / "test_breaking.py").write_text(BREAKING)
    root = Path(__file__).resolve().parents[2]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "xdist",
        "-p",
        "tests.tools.broken_gpu",
        "-n1",
        "-rf",
        "test_breaking.py",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    # The broken test counts twice: once for its report, once for the worker's exit.
    assert "4 failed, 1 passed" in done.stdout
    assert "test_breaks_the_gpu" in done.stdout and "crashed" in done.stdout
    assert "an illegal memory access was encountered" in done.stdout + done.stderr


def test_a_device_context_reaches_poisoned_memory() -> None:
    with torch.device("meta"):
        assert torch.nn.Linear(2, 3).weight.is_meta
    assert torch.empty(3).isnan().all()
