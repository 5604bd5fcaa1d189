"""``fastgpt doctor``: its report on this machine and on imitated ones."""

import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from fastgpt import devices
from fastgpt.__main__ import main
from fastgpt.cli import doctor as doctoring
from fastgpt.kernels import configs, torch_ops

CPU = torch.device("cpu")


def found() -> dict[str, str]:
    device = devices.resolve_device("auto")
    return doctoring.facts(device, devices.resolve_dtype("auto", device))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """imitate(major, minor): pretend that the machine has a GPU of that compute capability."""

    def imitate(major: int, minor: int) -> None:
        facts = SimpleNamespace(name="GPU X", major=major, minor=minor, total_memory=80 << 30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: facts)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.version, "cuda", "13.0")  # is_bf16_supported() reads it

    return imitate


def test_a_machine_without_a_gpu(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"Python +{platform.python_version()} at {sys.executable}", text)
    assert re.search(rf"PyTorch +{re.escape(torch.__version__)}, built (without|for) CUDA", text)
    assert re.search(r"ops +on PyTorch's kernels \(the Triton kernels need a CUDA GPU\)\n", text)
    assert re.search(r"adamw, attention, .*linear_cross_entropy, mlp", text)
    assert re.search(r"one update +agrees with .* error \d\.\de-0[5-9]", text)
    facts = found()
    assert facts["Triton"] == triton.__version__ and facts["GPU"].startswith("none")
    assert facts["NVIDIA driver"] == "not found (no nvidia-smi)"
    assert (facts["device auto"], facts["dtype auto"]) == ("cpu", "float32")
    assert facts["CUDA graph"].startswith("no: ") and facts["fp8"].startswith("no: ")


def test_a_new_gpu(gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "_TUNED", {})
    gpu(9, 0)
    facts = found()
    assert facts["GPU cuda:0"] == "GPU X, compute capability 9.0, 80.0 GiB"
    assert (facts["device auto"], facts["dtype auto"]) == ("cuda", "bfloat16")
    table = "on the Triton kernels, with the launch table of sm_90"
    assert facts["ops"] == f"{table} (fastgpt tune was not run)"
    monkeypatch.setattr(configs, "read_tuned", lambda device: {1: 2, 3: 4})
    assert found()["ops"] == f"{table} (2 entries tuned here)"
    assert facts["CUDA graph"].startswith("yes: ") and facts["fp8"] == "yes: --fp8=head"


def test_machines_that_lack_something(
    gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(8, 6)
    facts = found()
    assert facts["fp8"].startswith("no: ") and "launch table of sm_80" in facts["ops"]
    gpu(7, 5)
    facts = found()
    assert "launch table of sm_75" in facts["ops"] and facts["fp8"].startswith("no: ")
    assert facts["ops"].endswith(
        "; attention and attention_qkvpacked on PyTorch's, as Triton has no tensor cores before 8.0"
    )
    gpu(7, 0)
    facts = found()
    for what in ("GPU cuda:0", "ops"):
        assert "need compute capability 7.5, and GPU X has 7.0" in facts[what]
    assert facts["dtype auto"] == "float16" and "float16" in facts["CUDA graph"]
    gpu(9, 4)
    with monkeypatch.context() as patched:
        patched.setattr(torch.version, "hip", "7.0")
        facts = found()
    assert "built for ROCm" in facts["PyTorch"] and "built for ROCm" in facts["ops"]
    assert facts["fp8"].startswith("no: ")
    monkeypatch.setattr(doctoring.util, "find_spec", lambda name: None)
    monkeypatch.setattr(devices, "_HAS_TRITON", False)
    facts = found()
    assert facts["Triton"] == "not installed" and "Triton is not installed" in facts["ops"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 550.1; echo 550.1", "550.1"),
        ("echo no communication; exit 9", "nvidia-smi fails: no communication"),
        ("exec sleep 9", "nvidia-smi does not answer within 1 s"),
    ],
)
def test_a_driver_without_a_usable_gpu(
    script: str, expected: str, no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(doctoring, "_DRIVER_SECONDS", 1 if "sleep" in script else 30)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = found()
    assert facts["NVIDIA driver"] == expected
    assert facts["GPU"] == "none that PyTorch can use; CUDA_VISIBLE_DEVICES=''"


def test_half_precision_passes_and_wrong_numbers_do_not(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 1e-4 < doctoring.update_error(CPU, torch.bfloat16) < doctoring._TOLERANCE / 2
    right = torch_ops.mlp
    for factor in (1.2, torch.nan):
        monkeypatch.setattr(torch_ops, "mlp", lambda *x, f=factor, **keys: f * right(*x, **keys))
        assert main(["doctor"]) == 1
        assert "DIFFERS FROM the reference ops" in capsys.readouterr().out
