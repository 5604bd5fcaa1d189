"""Builds ``device.cpp`` in a separate process: the build imports torch, which the process that uses
the device must not have imported yet.

    python -m tests.tools.pretend_cuda.build   # builds it unless cached; prints the path
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

MODULE = "_pretend_cuda"
TORCH = "2.13"  # device.cpp and api.py depend on its internals
_SOURCE = Path(__file__).with_name("device.cpp")


def why_not() -> str | None:
    """Why the device cannot be used on this machine, or None."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "the pretended device is for Linux on x86-64"
    version = metadata.version("torch")
    if not version.startswith(f"{TORCH}."):
        return f"the pretended device knows the internals of torch {TORCH}, not of {version}"
    if _torch_folder().joinpath("lib", "libtorch_cuda.so").exists() or "rocm" in version:
        return "the pretended device is for a torch without CUDA"
    if shutil.which("g++") is None:
        return "the pretended device needs g++"
    if shutil.which("ninja") is None:
        return "the pretended device needs ninja (pip install ninja)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "the pretended device needs Python's headers"
    return None


@functools.cache
def library() -> Path:
    """Path of the module in the cache folder; built if necessary."""
    path = _path()
    if not path.exists():
        environment = {**os.environ, "PYTHONPATH": str(_SOURCE.parents[3])}
        command = [sys.executable, "-m", "tests.tools.pretend_cuda.build"]
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return path


def _torch_folder() -> Path:
    """Find torch's folder without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def _path() -> Path:
    parts = (_SOURCE.read_text(), str(_torch_folder()), metadata.version("torch"), sys.version)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fastgpt" / "pretend_cuda" / key / f"{MODULE}.so"


def _build() -> Path:
    """Atomic; concurrent processes build only once."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                os.replace(_compiled(folder), path)
    return path


def _compiled(folder: str) -> Path:
    from torch.utils import cpp_extension

    cpp_extension.load(
        MODULE,
        [str(_SOURCE)],
        extra_cflags=["-O0", "-w"],  # compiling takes longer than running
        extra_ldflags=[f"-Wl,-rpath,{_torch_folder() / 'lib'}"],
        build_directory=folder,
        is_python_module=False,
    )
    return Path(folder, f"{MODULE}.so")


if __name__ == "__main__":
    print(_build())
