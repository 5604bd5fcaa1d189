"""Runs pytest on the pretended device in a separate process, since the device must be loaded before
torch.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.pretend_cuda import build

_ROOT = Path(__file__).parents[3]
PROGRAMS = Path(__file__).with_name("programs")

needs_pretended_device = pytest.mark.skipif(
    build.why_not() is not None, reason=build.why_not() or ""
)


def start(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run ``python -m tests.tools.pretend_cuda ARGUMENTS`` in the project's root."""
    path = [str(_ROOT), os.environ.get("PYTHONPATH")]
    return subprocess.run(
        [sys.executable, "-m", "tests.tools.pretend_cuda", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        cwd=_ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def passes(*arguments: str, interpret: bool = False, own: bool = True) -> None:
    """Assert that these tests pass without findings. ``own``: tests of this tool, which run without
    the project's conftest."""
    options = ["-n0", "-q", "-p", "no:cacheprovider", "-p", "tests.tools.pretend_cuda.plugin"]
    run = start(
        *(["--interpret"] if interpret else []),
        *("-m", "pytest", *options, "--tb=short", "--show-capture=no"),
        *(["--noconftest"] if own else []),
        *arguments,
    )
    assert run.returncode == 0, run.stdout
