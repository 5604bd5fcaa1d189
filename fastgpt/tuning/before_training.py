"""``fastgpt train`` tunes the kernels for its model first, where nothing is known of them yet."""

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
_START = 12  # of these, for the other process to import PyTorch and to reach its GPU


def tune_before_training(
    work: Workload, device: torch.device, say: Callable[[str], object], n_processes: int = 1
) -> None:
    """Tune for a model in at most ``SECONDS``, unless it was done before, and use the result.

    Another process does it: whatever a candidate breaks there, a compiler or the GPU's context,
    training goes on. Several processes of one run use what ``fastgpt tune`` wrote, and tune
    nothing: they would measure each other. Nothing is done for float32, which keeps its launches,
    nor without a folder for the result."""
    path = tuned_table.path_of(device)
    if path is None or work.dtype == torch.float32 or str(work) in Table.read(device).workloads:
        return
    if n_processes > 1:
        say("kernels are not tuned for this model: run fastgpt tune on one GPU first, if you like")
        return
    say(f"tuning the kernels for this model and GPU, {SECONDS} s at most; --tune=False leaves it")
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
        say(f"stopped after {SECONDS} s; the next run goes on with what is left")
    except OSError as error:
        say(f"not tuned, training goes on: {without_errno(error)}")
    else:
        said = run.stdout.strip().splitlines() or [f"exit code {run.returncode}"]
        say(said[-1] if run.returncode == 0 else f"not tuned, training goes on: {said[-1]}")
    configs.read_tuned(device)
