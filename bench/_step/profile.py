"""The time of a training step by kernel and by kind of work, beside the floor: a part of
``gpu_report.py``, which writes profile.json into FOLDER.

    python -m bench._step.profile FOLDER
"""

import sys
import tempfile
import traceback
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from bench._harness import machine
from bench._harness.cli import failure_of, write_json
from bench._harness.timing import Clock, spread, synchronize
from bench._roofline.ceilings import Ceilings, floor
from bench._step.variants import VARIANTS, Options, Plan, Training, tf32
from fastgpt import GPT, GPTConfig
from fastgpt.data.builtin_texts import prepare_builtin

_STEPS = 5

# What a GPU kernel's name contains → the kind of work, as in ``_roofline/ceilings.py``; the first
# that fits counts.
_KINDS = {
    "attention": ("attention", "flash", "fmha"),
    "LayerNorm and residual": ("layer_norm", "_sum_bands"),
    "embedding": ("embedding", "radix", "sort", "searchsorted"),
    "loss": ("cross_entropy",),
    "optimizer": ("adam", "multi_tensor", "norm_kernel", "lpnorm"),
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "splitk", "_linear_", "_weight_grad"),
    "GELU": ("gelu",),
    "casts": ("cast", "amax", "quantise", "transpose"),
    "copies and sums": ("",),
}


def profile(folder: Path, options: Options | None = None) -> int:
    """Profile updates of ``fastgpt train``, and of its model in nanoGPT's loop; 1 if one fails.
    ``options``: of run.py."""
    options = options or Options()
    with tempfile.TemporaryDirectory() as temporary, tf32(True):
        plan = Plan.of(options, prepare_builtin(Path(temporary)).data_dir)
        measured = machine.ceilings(plan.device)
        ceilings = Ceilings("measured", measured["matmul_tflops"], measured["copy_tb_per_s"])
        floor_ms = floor_by_kind(plan.config, options, ceilings)
        found: dict[str, Any] = {
            "batch_size": options.batch_size,
            "block_size": options.block_size,
            "variants": {},
        }
        for name in ("fastgpt_train", "fastgpt"):
            try:
                step_ms, kernels = _profiled(Training(VARIANTS[name], plan), plan.device)
                found["variants"][name] = {"step_ms": step_ms, **by_kind(kernels, floor_ms)}
            except Exception as error:  # whatever it is, the other is still profiled
                traceback.print_exc()
                found["variants"][name] = {"failure": failure_of(error)}
            write_json(folder / "profile.json", found)
    return int(any("failure" in one for one in found["variants"].values()))


def _profiled(training: Training, device: torch.device) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds of a step without the profiler, which takes time; the kernels of a step."""
    on_gpu = device.type == "cuda"
    for _ in range(3):
        training.step()
    clock = Clock(device)
    for _ in range(_STEPS):
        clock.mark()
        training.step()
    clock.mark()
    step_ms = spread(clock.durations_ms()).median
    with profiler(activities=[getattr(ProfilerActivity, "CUDA" if on_gpu else "CPU")]) as found:
        for _ in range(_STEPS):
            training.step()
        synchronize(device)
    kernels = []
    for event in found.key_averages():
        if not on_gpu or event.device_type == DeviceType.CUDA:
            us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            calls, ms = event.count / _STEPS, us / _STEPS / 1e3
            kernels.append({"name": event.key, "calls": calls, "ms": ms})
    return step_ms, kernels


def floor_by_kind(config: GPTConfig, options: Options, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds of a step: the floor of forward and backward, and AdamW, which moves 28 bytes a
    float32 parameter."""
    with torch.device("meta"):
        n_parameters = GPT(config).get_num_params(non_embedding=False)
    found: defaultdict[str, float] = defaultdict(float)
    for row in floor(config, options.batch_size, options.block_size, ceilings):
        found[row.kind] += row.ms
    found["optimizer"] = ceilings.ms(0, 28 * n_parameters, True)
    return dict(found)


def kind_of_kernel(name: str) -> str:
    name = name.lower()
    return next(kind for kind, parts in _KINDS.items() if any(part in name for part in parts))


def by_kind(kernels: list[dict[str, Any]], floor_ms: dict[str, float]) -> dict[str, Any]:
    """Time, share of all kernels' time, and floor of each kind; the 40 slowest kernels. The floor
    counts the loss among the matrix products."""
    total = sum(kernel["ms"] for kernel in kernels)
    sums = dict.fromkeys(floor_ms, 0.0)
    for kernel in kernels:
        kernel["kind"] = kind_of_kernel(kernel["name"])
        sums[kernel["kind"]] = sums.get(kernel["kind"], 0.0) + kernel["ms"]
    return {
        "kernels_ms": total,
        "floor_ms": sum(floor_ms.values()),
        "kinds": [
            {"kind": kind, "ms": ms, "share": ms / total, "floor_ms": floor_ms.get(kind)}
            for kind, ms in sorted(sums.items(), key=lambda item: -item[1])
        ],
        "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"])[:40],
    }


if __name__ == "__main__":
    sys.exit(profile(Path(sys.argv[1])))
