"""``fastgpt doctor``: what this machine has, what will run where, and what to do about the rest.

Nothing is taken on trust: one small update is made, in a process of its own, so that whatever goes
wrong there (a crash of the driver included) is a line of the report.
"""

import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fastgpt import ops
from fastgpt.devices import resolve_device, resolve_dtype, triton_refusal

if TYPE_CHECKING:
    from rich.console import Console

_TORCH_VERSIONS = ((2, 11), (2, 14))  # from, and below
_TRITON_VERSION = (3, 6)
_FP8_CAPABILITY = (8, 9)
_CACHE_BYTES = 1 << 30  # kernels of one model need a few dozen MB
_USER_EXTRAS = ("bpe", "data", "hf", "log")
_DRIVER_SECONDS, _TRIAL_SECONDS = 30, 300  # the first run compiles every kernel

_TRIAL = """
import sys, torch
from fastgpt import GPT, GPTConfig
from fastgpt.devices import autocast, resolve_dtype
device = torch.device(sys.argv[1])
model = GPT(GPTConfig(block_size=64, vocab_size=128, n_layer=1, n_head=2, n_embd=64)).to(device)
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
idx = torch.randint(128, (2, 64), device=device)
with autocast(device, resolve_dtype("auto", device)):
    loss = model(idx, idx)[1]
loss.backward()
optimizer.step()
assert all(p.isfinite().all() for p in model.parameters()), "the new weights are not finite"
print(f"{loss.item():.2f}")
"""


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine has, what will run where, and what to fix."""


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` is empty where there is nothing to do."""

    what: str
    found: str
    fix: str = ""


def doctor(console: "Console") -> int:
    """Print the report. Returns 0, or 1 if training cannot run at all."""
    from rich.table import Table

    findings = examine()
    device = resolve_device("auto")
    trials = [_trial(device)]
    if trials[0].fix and device.type != "cpu":
        trials.append(_trial(torch.device("cpu")))
    findings += trials
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        table.add_row(finding.what, finding.found)
    console.print(table)
    fixes = [finding for finding in findings if finding.fix]
    if fixes:
        console.print("\nto fix:")
    for finding in fixes:
        console.print(f"- {finding.what}: {finding.fix}")
    works = any(not trial.fix for trial in trials)
    console.print("\ntraining works" if works else "\ntraining cannot run")
    return 0 if works else 1


def examine() -> list[Finding]:
    """Everything but the trial."""
    return [
        Finding("Python", f"{platform.python_version()} at {sys.executable}"),
        _pytorch(),
        _triton(),
        _driver(),
        *_gpus(),
        _compiler(),
        _cache(),
        *_extras(),
        *_what_runs_where(),
    ]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def _pytorch() -> Finding:
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    low, high = (".".join(map(str, version)) for version in _TORCH_VERSIONS)
    known = _TORCH_VERSIONS[0] <= _version(torch.__version__) < _TORCH_VERSIONS[1]
    fix = "" if known else f'pip install "torch>={low},<{high}", the versions that are tested'
    return Finding("PyTorch", f"{torch.__version__}, {built}", fix)


def _triton() -> Finding:
    needed = ".".join(map(str, _TRITON_VERSION))
    if util.find_spec("triton") is None:
        if sys.platform != "linux":
            return Finding("Triton", f"not installed; there is none for {sys.platform}")
        return Finding("Triton", "not installed", f'pip install "triton>={needed}"')
    try:
        import triton  # its distribution may have another name: pytorch-triton, say
    except ImportError as error:
        return Finding("Triton", f"cannot be imported: {error}", f'pip install "triton>={needed}"')
    old = _version(triton.__version__) < _TRITON_VERSION
    return Finding("Triton", triton.__version__, f'pip install "triton>={needed}"' if old else "")


def _driver() -> Finding:
    """The driver as it describes itself, and why PyTorch may not see its GPUs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("NVIDIA driver", "not found (no nvidia-smi)")
    query = [program, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("NVIDIA driver", "nvidia-smi does not answer", "restart the machine")
    lines = (answer.stdout + answer.stderr).strip().splitlines() or ["no answer"]
    if answer.returncode:
        return Finding("NVIDIA driver", lines[-1], "install the NVIDIA driver anew, then restart")
    found = lines[0].partition(",")[0]
    if torch.cuda.is_available():
        return Finding("NVIDIA driver", found)
    if torch.version.cuda is None:
        fix = (
            "install a PyTorch that is built for CUDA (pip uninstall torch, then pip install torch)"
        )
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        fix = "unset CUDA_VISIBLE_DEVICES, which hides every GPU"
    else:
        fix = (
            f"PyTorch cannot use it: update the driver to one for CUDA {torch.version.cuda}, or "
            "install a PyTorch built for an older CUDA"
        )
    return Finding("NVIDIA driver", f"{found}, but PyTorch sees no GPU", fix)


def _gpus() -> list[Finding]:
    findings = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        found = (
            f"{facts.name}, compute capability {facts.major}.{facts.minor}, "
            f"{facts.total_memory / 2**30:.1f} GiB"
        )
        refusal = triton_refusal(torch.device("cuda", i))
        findings.append(Finding(f"GPU cuda:{i}", f"{found}; {refusal}" if refusal else found))
    return findings or [Finding("GPU", "none")]


def _compiler() -> Finding:
    """Of C, which Triton's launchers are in; on a CPU of C++, which torch.compile writes there."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        program = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    else:
        program = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = []
    if program is None or shutil.which(program) is None:
        missing.append("C compiler" if on_gpu else "C++ compiler")
    if not header.is_file():
        missing.append(f"{header}")
    if not missing:
        return Finding("compiler", str(program))
    found = f"no {' and no '.join(missing)}: no torch.compile"
    if not on_gpu:
        return Finding("compiler", found)
    return Finding(
        "compiler",
        f"{found}, and no Triton",
        "apt-get install gcc python3-dev (or your system's), or let CC name a compiler",
    )


def _cache() -> Finding:
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    there = next(
        parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists()
    )
    fix = "export TRITON_CACHE_DIR=FOLDER, on a local disk with space"
    if not (there.is_dir() and os.access(there, os.W_OK)):
        return Finding("cache folder", f"{folder} cannot be written", fix)
    free = shutil.disk_usage(there).free
    found = f"{folder}, {free / 2**30:.1f} GiB free"
    return Finding("cache folder", found, fix if free < _CACHE_BYTES else "")


def _extras() -> list[Finding]:
    """The optional packages, as the installed metadata lists them."""
    try:
        requirements = metadata.requires("fastgpt-triton") or []
    except metadata.PackageNotFoundError:
        return [Finding("fastgpt", "a clone that is not installed", "pip install -e .")]
    findings = []
    for extra in _USER_EXTRAS:
        mark = re.compile(rf"""([\w.-]+)[^;]*;.*extra == ['"]{extra}['"]""")
        names = [match[1] for line in requirements if (match := mark.match(line))]
        missing = [name for name in names if not _installed(name)]
        found = f'no {", ".join(missing)}: pip install "fastgpt-triton[{extra}]"'
        if names:
            findings.append(Finding(f"extra {extra}", found if missing else "installed"))
    return findings


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _what_runs_where() -> list[Finding]:
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    on_gpu = device.type == "cuda"
    triton = on_gpu and not triton_refusal(device)
    public = (name for name, _ in inspect.getmembers(ops, inspect.isfunction))
    names = ", ".join(name for name in public if not name.startswith("_"))
    if not on_gpu:
        graph = "no: it needs a CUDA GPU"
    elif dtype == torch.float16:
        graph = "no: in float16 the host decides"
    else:
        graph = "yes: an update is replayed as one"
    fp8 = triton and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
    return [
        Finding("device auto", str(device) if on_gpu else f"{device}: --device={device}"),
        Finding("dtype auto", str(dtype).removeprefix("torch.")),
        Finding("ops on Triton" if triton else "ops on PyTorch", names),
        Finding("CUDA graph", graph),
        Finding(
            "fp8",
            "yes: --fp8=head" if fp8 else "no: it needs compute capability 8.9",
        ),
    ]


def _trial(device: torch.device) -> Finding:
    """One update of a small model, in another process."""
    what = f"trial on {device}"
    command = [sys.executable, "-c", _TRIAL, str(device)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(what, f"no result within {_TRIAL_SECONDS} s", "look for a stuck process")
    if run.returncode == 0:
        return Finding(what, f"an update was made (loss {run.stdout.strip()})")
    lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
    fix = f"fastgpt train --device={device} --max_iters=1 shows the whole error"
    return Finding(what, f"failed: {lines[-1]}", fix)
