"""Tuning of the kernels at the start of ``fastgpt train``, once per model and GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import fastgpt
from fastgpt._files import without_errno
from fastgpt.kernels import configs, tuned_table
from fastgpt.tuning.table import Table
from fastgpt.tuning.workload import Workload

SECONDS = 60
_FOUND_IN = str(Path(fastgpt.__file__).parents[1])
_START = 12  # of these, for the other process to import PyTorch and initialize the GPU


def tune_before_training(
    work: Workload, device: torch.device, say: Callable[[str], object], n_processes: int = 1
) -> None:
    """Tune for a model in at most ``SECONDS``, unless that was done before, and use the result.

    Tuning runs in another process, so that training continues even if a candidate breaks the
    compiler or the GPU's context. A distributed run uses the results of ``fastgpt tune`` and does
    not tune, because its processes would disturb each other's measurements. Does nothing for
    float32, which is not tuned, and without a folder for the result."""
    path = tuned_table.path_of(device)
    if path is None or work.dtype == torch.float32 or str(work) in Table.read(device).workloads:
        return
    if n_processes > 1:
        say("kernels are not tuned for this model; to do so, first run fastgpt tune on one GPU")
        return
    say(f"tuning the kernels for this model and GPU, {SECONDS} s at most; --tune=False skips it")
    keys = {**asdict(work), "dtype": str(work.dtype).removeprefix("torch.")}
    given = json.dumps([keys, str(device), SECONDS - _START])
    search = os.pathsep.join(filter(None, (_FOUND_IN, os.environ.get("PYTHONPATH"))))
    try:
        run = subprocess.run(
            [sys.executable, "-m", "fastgpt.tuning", given],
            env={**os.environ, "PYTHONPATH": search},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        say(f"stopped tuning after {SECONDS} s; the next run tunes the rest")
    except OSError as error:
        say(f"not tuned, training continues: {without_errno(error)}")
    else:
        said = run.stdout.strip().splitlines() or [f"exit code {run.returncode}"]
        say(said[-1] if run.returncode == 0 else f"not tuned, training continues: {said[-1]}")
    configs.read_tuned(device)
