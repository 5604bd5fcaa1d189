"""The time of a training step by kernel, which goes to profile.json in FOLDER: a part of
``gpu_report.py``.

    python -m bench._step.profile FOLDER
"""

import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

from bench._harness.cli import failure_of, write_json
from bench._harness.timing import Clock, spread, synchronize
from bench._step.variants import VARIANTS, Options, Plan, Training, tf32
from fastgpt.data.builtin_texts import prepare_builtin

_STEPS = 5


def profile(folder: Path, options: Options | None = None) -> int:
    """Profile updates of ``fastgpt train``, and of its model in nanoGPT's loop; 1 if one fails.
    ``options``: of run.py."""
    options = options or Options()
    found: dict[str, Any] = {
        "batch_size": options.batch_size,
        "block_size": options.block_size,
        "variants": {},
    }
    with tempfile.TemporaryDirectory() as temporary, tf32(True):
        prepare_builtin(temporary)
        plan = Plan.of(options, Path(temporary))
        for name in ("fastgpt_train", "fastgpt"):
            try:
                found["variants"][name] = _profiled(Training(VARIANTS[name], plan))
            except Exception as error:  # whatever it is, the other is still profiled
                traceback.print_exc()
                found["variants"][name] = {"failure": failure_of(error)}
            write_json(folder / "profile.json", found)
    return int(any("failure" in one for one in found["variants"].values()))


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


if __name__ == "__main__":
    sys.exit(profile(Path(sys.argv[1])))
