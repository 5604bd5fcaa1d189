"""The pretended device itself: its findings, its errors, and its build."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.pretend_cuda import build
from tests.tools.pretend_cuda.process import needs_pretended_device, start


@needs_pretended_device
def test_a_program_with_a_finding_fails(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "x, side = torch.ones(3, device='cuda'), torch.cuda.Stream()\n"
        "with torch.cuda.stream(side):\n"
        "    print((x + 1).tolist())\n"
    )
    run = start(str(program))
    assert run.returncode == 70 and "[2.0, 2.0, 2.0]\n" in run.stdout
    assert "pretended device: race: aten::add.out on stream" in run.stdout
    assert "program.py:4" in run.stdout


@needs_pretended_device
def test_it_is_built_once_for_each_source_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.library()
    assert path.is_file() and path == build._path()
    monkeypatch.setattr(build.metadata, "version", lambda name: "2.13.1")
    assert build._path() != path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("metadata.version", lambda name: "2.12.1"), "internals of torch 2.13, not of 2.12.1"),
        (("metadata.version", lambda name: "2.13.0+rocm7"), "a torch without CUDA"),
        (("platform.machine", lambda: "aarch64"), "Linux on x86-64"),
        (("shutil.which", lambda name: None), "needs g++"),
        (("sysconfig.get_path", lambda name: "/nowhere"), "needs Python's headers"),
    ],
)
def test_where_it_is_not(
    change: tuple, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(build.sys, "platform", "linux")
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build.metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(build, "_torch_folder", lambda: Path("/nowhere"))
    monkeypatch.setattr(build.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert build.why_not() is None
    monkeypatch.setattr(f"tests.tools.pretend_cuda.build.{change[0]}", change[1])
    found = build.why_not()
    assert found is not None and reason in found


def test_a_torch_that_it_does_not_know_is_not_touched(tmp_path: Path) -> None:
    """The program is not started; the reason is printed."""
    code = (
        "from importlib import metadata; metadata.version = lambda name: '2.12.0'\n"
        "import sys; sys.argv = ['pretend_cuda', 'program.py']\n"
        "from tests.tools.pretend_cuda.__main__ import main; main()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "not of 2.12.0" in run.stderr
