"""Profile of a training step, by kernel in OUT/profile.json and by kind of work in
OUT/profile.png: a part of ``gpu_report.py``.

    python -m bench._step.profile OUT
"""

import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from bench._harness import cli
from bench._harness.bars import stacked_bars
from bench._harness.timing import spread
from bench._step.variants import VARIANTS, Options, Plan, Training, default_options, tf32
from fastgpt.data.builtin_texts import prepare_builtin
from fastgpt.timing import Clock, synchronize

_STEPS = 5

# Kinds of work in the order of the bars, with substrings of kernel names (ours, PyTorch's,
# torch.compile's and NVIDIA libraries') in lower case. The first match counts.
KINDS: dict[str, tuple[str, ...]] = {
    "loss": ("cross_entropy", "log_softmax", "nll_loss", "_scaled_kernel"),
    # cudnn::fusion: the work before and after the products in cuDNN's attention backward.
    "attention": ("attention", "sdpa", "flash", "cudnn::fusion"),
    "AdamW and gradients": ("adam", "multi_tensor", "lpnorm", "normtwo"),
    "LayerNorm and residual": ("layer_norm",),
    "matrix products": (
        *("nvjet", "gemm", "cutlass", "splitk", "linear_gelu", "weight_grad"),
        *("addmm", "aten::mm"),
    ),
    "GELU": ("gelu", "erf"),
    "embedding": ("embedding", "radix"),
    "copies and sums": ("",),
}


def profile(folder: Path, options: Options | None = None) -> int:
    """Profile steps of nanoGPT under torch.compile, of fastgpt in nanoGPT's loop and of ``fastgpt
    train``, or of the variants in ``options``, those of run.py; 1 if one fails."""
    if options is None:
        names = "sdpa_compile", "fastgpt", "fastgpt_train"
        options = replace(default_options(), variants=names)
    found: dict[str, Any] = {
        "batch_size": options.batch_size,
        "block_size": options.block_size,
        "variants": {},
    }
    with tempfile.TemporaryDirectory() as temporary, tf32(True):
        prepare_builtin(temporary)
        plan = Plan.of(options, Path(temporary))
        for name in options.variants:
            try:
                found["variants"][name] = _profiled(Training(VARIANTS[name], plan))
            except Exception as error:  # whatever it is, the others are still profiled
                traceback.print_exc()
                found["variants"][name] = {"failure": cli.failure_of(error)}
            cli.write_json(folder / "profile.json", found)
    with suppress(ModuleNotFoundError):  # matplotlib: the figures are there without it
        chart(found, folder / "profile.png")
    return int(any("failure" in one for one in found["variants"].values()))


def by_kind(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of each kind of work."""
    out = dict.fromkeys(KINDS, 0.0)
    for kernel in kernels:
        name = kernel["name"].lower()
        fits = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
        out[next(fits)] += kernel["ms"]
    return out


def chart(found: dict[str, Any], path: Path) -> None:
    """A profile as bars of stacked kinds of work, as a PNG; nothing if no variant has one."""
    times = {
        VARIANTS[name].label: by_kind(one["kernels"])
        for name, one in found["variants"].items()
        if "failure" not in one
    }
    if times:
        title = f"B={found['batch_size']}, T={found['block_size']}"
        stacked_bars(times, title, "ms of a training step's kernels, without gaps", path)


def _profiled(training: Training) -> dict[str, Any]:
    """Milliseconds of a step without the profiler, which takes time; and the kernels of a step, the
    slowest first: calls, milliseconds, share of all kernels' time."""
    device = training.device
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
            ms = us / _STEPS / 1e3
            kernels.append({"name": event.key, "calls": event.count / _STEPS, "ms": ms})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    total = sum(kernel["ms"] for kernel in kernels)
    for kernel in kernels:
        kernel["share"] = kernel["ms"] / total
    return {"step_ms": step_ms, "kernels_ms": total, "kernels": kernels}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: that of ``profile``, or 2 for a wrong argument."""
    parser = cli.Parser(description="The time of a training step by kernel.")
    parser.add_argument("out", type=Path, help="folder for profile.json and profile.png")
    try:
        folder = cli.made_folder(parser.parse_args(argv).out)
    except OSError as error:
        return cli.failed(error)
    return profile(folder)


if __name__ == "__main__":
    sys.exit(main())
