"""Where the time of a training step goes, by kernel and by kind of work, against the floor: a part
of ``gpu_report.py``, which leaves profile.json in FOLDER.

    python bench/_step/profile.py FOLDER
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

# What a GPU kernel's name contains → the kind of work, as in ``_ceilings.floor``; the first that
# fits counts.
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
    """A few updates of ``fastgpt train``, and steps of its model in nanoGPT's loop, under PyTorch's
    profiler, by kernel and by kind of work. ``options``: of run.py, if not its own."""
    options = options or Options()
    with tempfile.TemporaryDirectory() as temporary, tf32(True):
        prepare_builtin(temporary)
        plan = Plan.of(options, Path(temporary))
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
            except Exception as error:  # whatever it is, the other is profiled all the same
                traceback.print_exc()
                found["variants"][name] = {"failure": failure_of(error)}
            write_json(folder / "profile.json", found)
    return int(any("failure" in one for one in found["variants"].values()))


def _profiled(
    training: Training, device: torch.device, steps: int = 5
) -> tuple[float, list[dict[str, Any]]]:
    """Milliseconds of a step without the profiler, which takes time; the kernels of a step."""
    on_gpu = device.type == "cuda"
    for _ in range(3):
        training.step()
    clock = Clock(device)
    for _ in range(steps):
        clock.mark()
        training.step()
    clock.mark()
    step_ms = spread(clock.durations_ms()).median
    with profiler(activities=[getattr(ProfilerActivity, "CUDA" if on_gpu else "CPU")]) as found:
        for _ in range(steps):
            training.step()
        synchronize(device)
    return step_ms, [
        {
            "name": event.key,
            "calls": event.count / steps,
            "ms": (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
            / steps
            / 1e3,
        }
        for event in found.key_averages()
        if not on_gpu or event.device_type == DeviceType.CUDA
    ]


def floor_by_kind(config: GPTConfig, options: Options, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds of a step: forward and backward as in ``_ceilings``, and AdamW, which moves 28
    bytes a float32 parameter."""
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
    """Share of the kernels' time, the floor and the ratio for each kind; the kernels themselves,
    the slowest first. The floor counts the logits' rows among the matrix products."""
    total = sum(kernel["ms"] for kernel in kernels)
    sums: defaultdict[str, float] = defaultdict(float)
    for kernel in kernels:
        kernel["kind"] = kind_of_kernel(kernel["name"])
        kernel["share"] = kernel["ms"] / total if total else 0.0
        sums[kernel["kind"]] += kernel["ms"]
    kinds = [
        {
            "kind": kind,
            "ms": sums.get(kind, 0.0),
            "share": sums.get(kind, 0.0) / total if total else 0.0,
            "floor_ms": floor_ms.get(kind),
            "ratio": sums.get(kind, 0.0) / floor_ms[kind] if floor_ms.get(kind) else None,
        }
        for kind in dict.fromkeys((*sums, *floor_ms))
    ]
    return {
        "kernels_ms": total,
        "floor_ms": sum(floor_ms.values()),
        "kinds": sorted(kinds, key=lambda row: -row["ms"]),
        "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"])[:40],
    }


if __name__ == "__main__":
    sys.exit(profile(Path(sys.argv[1])))
