"""``fastgpt doctor``: what it says of this machine, and of others that are imitated."""

import io
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from rich.console import Console

from fastgpt import devices
from fastgpt.__main__ import main
from fastgpt.cli import doctor as doctoring
from fastgpt.cli.doctor import Finding, doctor, examine

ROOT = Path(__file__).resolve().parents[2]


def report() -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    code = doctor(console)
    assert isinstance(console.file, io.StringIO)
    return code, console.file.getvalue()


def found() -> dict[str, Finding]:
    return {finding.what: finding for finding in examine()}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """A machine with a GPU of some compute capability."""

    def imitate(major: int, minor: int) -> None:
        facts = SimpleNamespace(name="GPU X", major=major, minor=minor, total_memory=80 << 30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: facts)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.version, "cuda", "13.0")  # bfloat16 is asked of both

    return imitate


def a_program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_machine_without_a_gpu(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(ROOT))  # no nvidia-smi, no compiler
    monkeypatch.delenv("CC", raising=False)
    code, text = report()
    assert code == 0 and text.rstrip().endswith("training works")
    assert re.search(rf"Python +{platform.python_version()} at {sys.executable}", text)
    assert re.search(rf"PyTorch +{re.escape(torch.__version__)}, built (without|for) CUDA", text)
    assert re.search(r"ops on PyTorch +adamw, attention, .*linear_cross_entropy, mlp", text)
    assert re.search(r"trial on cpu +an update was made \(loss 4\.\d\d\)", text)
    facts = found()
    assert facts["NVIDIA driver"] == Finding("NVIDIA driver", "not found (no nvidia-smi)")
    assert facts["GPU"].found == "none"
    assert facts["compiler"].found.startswith("no C++ compiler") and not facts["compiler"].fix
    assert facts["device auto"].found == "cpu: --device=cpu"
    assert facts["dtype auto"].found == "float32"
    assert facts["CUDA graph"].found.startswith("no: ") and facts["fp8"].found.startswith("no: ")


def test_a_new_gpu(gpu: Callable[[int, int], None]) -> None:
    gpu(9, 0)
    facts = found()
    assert facts["GPU cuda:0"] == Finding(
        "GPU cuda:0", "GPU X, compute capability 9.0, 80.0 GiB", ""
    )
    assert facts["device auto"].found == "cuda" and facts["dtype auto"].found == "bfloat16"
    assert "linear_cross_entropy" in facts["ops on Triton"].found
    assert facts["CUDA graph"].found == "yes: an update is replayed as one"
    assert facts["fp8"].found == "yes: --fp8=head"


def test_gpus_that_are_too_old_for_something(gpu: Callable[[int, int], None]) -> None:
    gpu(8, 6)
    facts = found()
    assert not facts["GPU cuda:0"].fix and facts["fp8"].found.startswith("no: ")
    assert "ops on Triton" in facts
    gpu(7, 0)
    facts = found()
    assert not facts["GPU cuda:0"].fix
    assert "need compute capability 8.0, and GPU X has 7.0" in facts["GPU cuda:0"].found
    assert "ops on PyTorch" in facts
    assert facts["dtype auto"].found == "float16" and "float16" in facts["CUDA graph"].found


@pytest.mark.parametrize(
    ("cuda", "built"), [(None, "built without CUDA"), ("13.0", "built for CUDA 13.0")]
)
def test_what_pytorch_is_built_for(
    cuda: str | None, built: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert found()["PyTorch"] == Finding("PyTorch", f"{torch.__version__}, {built}")


def test_rocm(gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    facts = found()
    assert "built for ROCm" in facts["GPU cuda:0"].found and "ops on PyTorch" in facts
    assert facts["fp8"].found.startswith("no: ")


def test_versions_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.4.1")
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    facts = found()
    assert facts["PyTorch"].fix.startswith('pip install "torch>=2.11,<2.14"')
    assert facts["Triton"] == Finding("Triton", "3.1.0", 'pip install "triton>=3.6"')


def test_the_versions_are_those_of_the_metadata() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '"torch>=2.11,<2.14"' in text and '"triton>=3.6;' in text
    assert doctoring._TORCH_VERSIONS == ((2, 11), (2, 14))
    assert doctoring._TRITON_VERSION == (3, 6)


def test_no_triton(gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(9, 0)
    monkeypatch.setattr(doctoring.util, "find_spec", lambda name: None)
    monkeypatch.setattr(devices, "_HAS_TRITON", False)
    monkeypatch.setattr(sys, "platform", "linux")
    facts = found()
    assert facts["Triton"].fix == 'pip install "triton>=3.6"' and "ops on PyTorch" in facts
    monkeypatch.setattr(sys, "platform", "darwin")
    assert found()["Triton"] == Finding("Triton", "not installed; there is none for darwin")


def test_a_triton_of_another_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytorch-triton, which nightly builds of PyTorch bring, or a folder on the path."""

    def version(name: str) -> str:
        raise doctoring.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctoring.metadata, "version", version)
    assert found()["Triton"] == Finding("Triton", triton.__version__, "")


@pytest.mark.parametrize(
    ("script", "cuda", "hidden", "fix"),
    [
        ("echo 550.1, X", "13.0", None, "PyTorch cannot use it: update the driver to one for CUDA"),
        ("echo 550.1, X", None, None, "install a PyTorch that is built for CUDA"),
        ("echo 550.1, X", "13.0", "", "unset CUDA_VISIBLE_DEVICES"),
        ("echo no communication; exit 9", "13.0", None, "install the NVIDIA driver anew"),
        ("exec sleep 9", "13.0", None, "restart the machine"),
    ],
)
def test_a_driver_whose_gpu_pytorch_does_not_see(
    script: str,
    cuda: str | None,
    hidden: str | None,
    fix: str,
    no_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a_program(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if "sleep" in script:
        monkeypatch.setattr(doctoring, "_DRIVER_SECONDS", 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert found()["NVIDIA driver"].fix.startswith(fix)


def test_a_driver_that_works(
    gpu: Callable[[int, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9, 0)
    a_program(tmp_path / "nvidia-smi", "echo 550.1, X; echo 550.1, X")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found()["NVIDIA driver"] == Finding("NVIDIA driver", "550.1")


def test_a_gpu_without_a_compiler(
    gpu: Callable[[int, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "absent-cc")
    monkeypatch.setattr(doctoring.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    finding = found()["compiler"]
    assert finding.found.startswith(f"no C compiler and no {tmp_path}/Python.h: ")
    assert finding.fix.startswith("apt-get install gcc python3-dev")
    a_program(tmp_path / "absent-cc", "true")
    (tmp_path / "Python.h").touch()
    assert found()["compiler"] == Finding("compiler", "absent-cc")


def test_a_cpu_with_a_compiler_of_c_alone(
    no_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile writes C++ for a CPU."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    a_program(tmp_path / "gcc", "true")
    finding = found()["compiler"]
    assert finding == Finding("compiler", "no C++ compiler: no torch.compile")
    a_program(tmp_path / "g++", "true")
    assert found()["compiler"] == Finding("compiler", "g++")
    monkeypatch.setenv("CXX", "icpx")
    assert found()["compiler"].found.startswith("no C++ compiler")


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "yet"))
    finding = found()["cache folder"]
    assert finding.found.startswith(f"{tmp_path}/not/yet, ") and not finding.fix
    assert not (tmp_path / "not").exists()
    usage: Any = shutil._ntuple_diskusage(1 << 40, 1 << 40, 1 << 20)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert found()["cache folder"].fix.startswith("export TRITON_CACHE_DIR=")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file"))
    finding = found()["cache folder"]
    assert finding.found.endswith("file cannot be written") and finding.fix
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert found()["cache folder"].found.startswith(f"{tmp_path}/.triton/cache")


def test_the_extras_are_those_of_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        'torch<2.14,>=2.11; sys_platform == "linux"',
        'safetensors>=0.4; extra == "hf"',
        'no-such-thing>=4.44; extra == "hf"',
        'torch>=0.7; python_version > "3" and extra == "bpe"',
        'nothing; extra == "test"',
    ]
    monkeypatch.setattr(doctoring.metadata, "requires", lambda name: lines)
    facts = found()
    missing = 'no no-such-thing: pip install "fastgpt-triton[hf]"'
    assert facts["extra hf"] == Finding("extra hf", missing)
    assert facts["extra bpe"] == Finding("extra bpe", "installed")
    assert "extra log" not in facts and "extra test" not in facts

    def not_installed(name: str) -> list[str]:
        raise doctoring.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctoring.metadata, "requires", not_installed)
    assert found()["fastgpt"].fix == "pip install -e ."


def test_training_that_cannot_run_at_all(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctoring, "_TRIAL", "import sys; sys.exit('no memory')")
    code, text = report()
    assert code == 1 == main(["doctor"]) and text.rstrip().endswith("training cannot run")
    assert re.search(r"trial on cpu +failed: no memory", text)
    assert "- trial on cpu: fastgpt train --device=cpu --max_iters=1 shows" in text


def test_a_gpu_that_fails_leaves_the_cpu(
    gpu: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(9, 0)
    crash = "import os, sys\nif sys.argv[1] == 'cuda': os.abort()\n"
    monkeypatch.setattr(doctoring, "_TRIAL", crash + doctoring._TRIAL)
    code, text = report()
    assert code == 0 and "training works" in text
    assert re.search(r"trial on cuda +failed: ", text)
    assert re.search(r"trial on cpu +an update was made", text)


def test_a_trial_that_hangs(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctoring, "_TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(doctoring, "_TRIAL_SECONDS", 1)
    code, text = report()
    assert code == 1 and "no result within 1 s" in text


def test_the_trial_runs_where_fastgpt_does() -> None:
    command = [sys.executable, "-c", doctoring._TRIAL, "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert 4.0 < float(run.stdout) < 5.5, run.stderr  # log(128) is 4.85
