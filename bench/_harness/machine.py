"""Description of the machine: versions, clocks, the chosen SDPA operator, and the measured ceilings
with which results are compared.
"""

import csv
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench._harness.timing import rate, spread
from fastgpt.devices import resolve_dtype
from fastgpt.kernels import torch_ops
from fastgpt.timing import Clock

ROOT = Path(__file__).resolve().parents[2]

_SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
)


def facts(device: torch.device) -> dict[str, Any]:
    """The machine and its software, without host and user names. Missing values are None.

    On CUDA, also ``gpu``, ``capability``, ``multiprocessors`` and ``memory_bytes``.
    """
    changes = _git("status", "--porcelain")
    found: dict[str, Any] = {
        "device": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": np.__version__,
        "fastgpt": _version("fastgpt-triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return found


def name(found: dict[str, Any]) -> str:
    """A short name for titles."""
    return str(found.get("gpu") or found["cpu"] or "CPU")


def gpu_state(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks, power and temperature from nvidia-smi, with units; None without a GPU or
    without nvidia-smi; {"error": its output} if it fails."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    run = subprocess.run(
        ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv"],
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        return {"error": (run.stdout + run.stderr).strip()}
    return parse_smi(run.stdout)


def parse_smi(output: str) -> dict[str, str]:
    """The two lines of ``nvidia-smi --query-gpu=... --format=csv`` → {field: value}."""
    header, values = csv.reader(output.strip().splitlines(), skipinitialspace=True)
    return {key.split(" [")[0]: value for key, value in zip(header, values, strict=True)}


def ceilings(device: torch.device) -> dict[str, Any]:
    """The measured rates of a large matrix product and a device copy, on random data.

    ``matmul_tflops``: a product of square matrices of size 8192 in half precision on CUDA, 1024 in
    float32 elsewhere. ``copy_tb_per_s``: bytes read plus bytes written, 2 GiB on CUDA (many times
    the cache), 64 MiB elsewhere. Medians; on CUDA, ``gpu_state`` is read while the products run.
    """
    on_gpu = device.type == "cuda"
    size, dtype = 8192 if on_gpu else 1024, resolve_dtype("auto", device)
    repeats = 300 if on_gpu else 10  # long enough for nvidia-smi to read a busy GPU
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    clock = Clock(device)
    for _ in range(repeats):
        clock.mark()
        torch.mm(a, b, out=out)
    clock.mark()
    state = gpu_state(device)
    flops = rate(spread(clock.durations_ms()[repeats // 5 :]), 2 * size**3)
    del a, b, out

    source = torch.randint(256, (1 << 30 if on_gpu else 1 << 25,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    for _ in range(20):
        clock.mark()
        target.copy_(source)
    clock.mark()
    copied = rate(spread(clock.durations_ms()[4:]), 2 * source.numel())
    return {
        "matmul_tflops": flops.median / 1e12,
        "matmul": f"{size}x{size}x{size} {dtype}",
        "copy_tb_per_s": copied.median / 1e12,
        "copy": f"{2 * source.numel()} bytes read and written",
        "gpu_state": state,
    }


def sdpa_operator(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, n_head: int, width: int
) -> str | None:
    """PyTorch's name for the implementation that ``F.scaled_dot_product_attention`` chooses when
    training with causal attention of this size."""
    qkv = torch.randn(batch, length, 3 * width, device=device, dtype=dtype, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        torch_ops.attention_qkvpacked(qkv, n_head)
    operators = [event.key for event in profiled.key_averages()]
    return next((op for op in operators if op.startswith("aten::_scaled_dot_product_")), None)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    """git's output for the source tree; None if it is not a checkout or git is missing."""
    if shutil.which("git") is None:
        return None
    run = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def _cpu_model() -> str | None:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None
