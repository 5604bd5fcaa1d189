"""Devices and dtypes: the keys ``device`` and ``dtype``, Triton support, random states."""

import importlib.util
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LEAST_CAPABILITY = (7, 5)


def triton_refusal(device: torch.device) -> str:
    """Why the Triton kernels do not run on a CUDA device, in one line; "" if they do."""
    if torch.version.hip is not None:
        reason = "the Triton kernels are for NVIDIA GPUs, and this PyTorch is built for ROCm"
    elif not _HAS_TRITON:
        reason = "Triton is not installed (pip install triton)"
    else:
        gpu = torch.cuda.get_device_properties(device.index)
        if (gpu.major, gpu.minor) >= _LEAST_CAPABILITY:
            return ""
        reason = (
            f"the Triton kernels need compute capability {_LEAST_CAPABILITY[0]}."
            f"{_LEAST_CAPABILITY[1]}, and {gpu.name} has {gpu.major}.{gpu.minor}"
        )
    return f"{reason}: CUDA tensors run on PyTorch's kernels"


def triton_multiplies(device: torch.device) -> bool:
    """Whether Triton's matrix products use the tensor cores of this GPU."""
    return torch.cuda.get_device_properties(device.index).major >= 8


# Dense bfloat16 TFLOP/s with float32 accumulation (before 8.0: float16), from the vendor's data
# sheets. The first name contained in the GPU's name applies.
_PEAKS = {
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.0,
    "T4": 65.0,
    "V100": 125.0,
}


def peak_flops(gpu: str) -> float | None:
    """Peak half-precision FLOP/s of matrix products, for the GPU's name as PyTorch reports it; None
    for an unknown GPU."""
    words = f" {gpu} ".replace("-", " ")
    if any(f" {other} " in words for other in ("Laptop", "D", "Max")):  # slower, of the same name
        return None
    found = (peak for name, peak in _PEAKS.items() if f" {name} " in words)
    return next((1e12 * peak for peak in found), None)


def resolve_device(name: str) -> torch.device:
    """The device that the key ``device`` names; ValueError if this machine does not have it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    here = ["cpu", *(["cuda", *gpus] if gpus else [])]
    if torch.backends.mps.is_available():
        here.append("mps")
    if name not in here:
        hint = ": --device=cpu runs here" if name.startswith("cuda") and not gpus else ""
        raise ValueError(
            f"device must be one that this machine has ({', '.join(here)}), got {name!r}{hint}"
        )
    return torch.device(name)


def has_bfloat16() -> bool:
    """Whether the current GPU has bfloat16 in hardware. GPUs before Ampere emulate it, slower than
    float32."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def is_native(dtype: str, device: torch.device) -> bool:
    """Whether ``device`` supports the dtype: float16 needs a GPU; bfloat16 needs hardware support
    on a GPU and runs on any other device."""
    if dtype == "float16":
        return device.type == "cuda"
    return dtype != "bfloat16" or device.type != "cuda" or has_bfloat16()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The autocast dtype that the key ``dtype`` means on ``device``; float32: no autocast."""
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if has_bfloat16() else torch.float16
    if name == "float16" and not is_native(name, device):
        raise ValueError(f"dtype must be auto, float32 or bfloat16 on {device.type}, got 'float16'")
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """The context in which the model runs."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of PyTorch's generators for the CPU and, if it is a GPU, ``device``."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore ``random_states``, which may come from a machine without a GPU."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
