"""``fastgpt doctor``: report versions, devices and what runs where on this machine, and check the
results of one small update. For bug reports.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata, util

import torch
from rich.console import Console
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.devices import (
    autocast,
    resolve_device,
    resolve_dtype,
    triton_multiplies,
    triton_refusal,
)
from fastgpt.kernels import reference

_FP8_CAPABILITY = (8, 9)
_DRIVER_SECONDS = 30
_TOLERANCE = 0.05  # bfloat16 on a model of width 64 is within 0.01


@dataclass(frozen=True)
class DoctorConfig:
    """Show versions, devices and what runs where, and check one small update."""


def doctor(console: Console) -> int:
    """Print the report, then check an update, so that the report is there even if that raises.
    Returns 0, or 1 if the results of the update are wrong.
    """
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    for what, found in facts(device, dtype).items():
        console.print(f"{what:<16}{found}")
    error = update_error(device, dtype)
    right = error <= _TOLERANCE
    console.print(
        f"{'one update':<16}{'agrees with' if right else 'DIFFERS FROM'} the reference ops in "
        f"float32 on the CPU: relative error {error:.1e}, allowed {_TOLERANCE}"
    )
    return 0 if right else 1


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The report, label → text. ``device`` and ``dtype`` are what the key value "auto" selects."""
    built = "built without CUDA"
    if torch.version.cuda or torch.version.hip:
        built = f"built for {'ROCm' if torch.version.hip else f'CUDA {torch.version.cuda}'}"
    names = ", ".join(reference.OPS)
    on_gpu = device.type == "cuda"
    refusal = triton_refusal(device) if on_gpu else "the Triton kernels need a CUDA GPU"
    graph = "no: it needs a CUDA GPU"
    if on_gpu:
        in_float16 = "no: in float16 the host decides whether to update"
        graph = in_float16 if dtype == torch.float16 else "yes: every update is replayed as one"
    capability = (0, 0) if refusal else torch.cuda.get_device_capability(device)
    where = f"on PyTorch's kernels ({refusal})"
    if not refusal:
        from fastgpt.kernels import configs  # needs Triton

        table = configs.architecture(10 * capability[0] + capability[1])
        n_measured = len(configs.read_tuned(device))
        measured = f"{n_measured} entries tuned here" if n_measured else "fastgpt tune was not run"
        where = f"on the Triton kernels, with the launch table of {table} ({measured})"
        if not triton_multiplies(device):
            plain = " and ".join(reference.OPS_OF_TENSOR_CORES)
            where += f"; {plain} on PyTorch's, as Triton has no tensor cores before 8.0"
    return {
        "fastgpt": _version_of_fastgpt(),
        "Python": f"{platform.python_version()} at {sys.executable}",
        "PyTorch": f"{torch.__version__}, {built}",
        "Triton": _triton(),
        "NVIDIA driver": _driver(),
        **_gpus(),
        "device auto": str(device),
        "dtype auto": str(dtype).removeprefix("torch."),
        "ops": where,
        "": names,
        "CUDA graph": graph,
        "fp8": "yes: --fp8=head"
        if capability >= _FP8_CAPABILITY
        else "no: it needs compute capability 8.9 or newer",
    }


def update_error(device: torch.device, dtype: torch.dtype) -> float:
    """The error of an update on ``device`` against the reference ops in float32 on the CPU: the
    largest relative error of loss, gradient, and loss after the update.
    """
    torch.manual_seed(0)
    config = GPTConfig(block_size=32, vocab_size=128, n_layer=1, n_head=2, n_embd=64)
    truth, model = GPT(config, ops=reference), GPT(config)
    model.load_state_dict(truth.state_dict())
    idx = torch.randint(128, (4, 32))
    expected = _updated(truth, idx, torch.float32)
    found = _updated(model.to(device), idx.to(device), dtype)
    errors = [(a - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(errors).max())


def _updated(model: GPT, idx: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Loss, gradient, and loss after one update, in float32 on the CPU."""
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), idx.device.type)
    losses = []
    for _ in range(2):
        with autocast(idx.device, dtype):
            loss = model(idx, idx)[1]
        losses.append(loss.detach())
        if len(losses) == 1:
            loss.backward()
            grads = (p.grad for p in model.parameters() if p.grad is not None)
            gradient = torch.cat([grad.flatten() for grad in grads])
            optimizer.step()
    return [x.float().cpu() for x in (losses[0], gradient, losses[1])]


def _version_of_fastgpt() -> str:
    try:
        return metadata.version("fastgpt-triton")
    except metadata.PackageNotFoundError:
        return "a clone that is not installed"


def _triton() -> str:
    if util.find_spec("triton") is None:
        return "not installed"
    try:
        import triton  # its distribution may have another name: pytorch-triton, say
    except ImportError as error:
        return f"cannot be imported: {error}"
    return str(triton.__version__)


def _driver() -> str:
    """The version that nvidia-smi reports."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "not found (no nvidia-smi)"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return f"nvidia-smi does not answer within {_DRIVER_SECONDS} s"
    lines = (answer.stdout + answer.stderr).strip().splitlines() or ["no answer"]
    return f"nvidia-smi fails: {lines[-1]}" if answer.returncode else lines[0]


def _gpus() -> dict[str, str]:
    found = {}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        refusal = triton_refusal(torch.device("cuda", i))
        found[f"GPU cuda:{i}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.1f} GiB{f'; {refusal}' if refusal else ''}"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    none = "none that PyTorch can use"
    return found or {"GPU": none if hidden is None else f"{none}; CUDA_VISIBLE_DEVICES={hidden!r}"}
