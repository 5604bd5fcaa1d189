"""Tokens per second of GPT training: this library beside PyTorch, in one process.

    python bench/run.py                             # GPT-2 124M on a GPU, a small size on a CPU
    python bench/run.py --batch_size=8 --variants fastgpt sdpa_compile
    python bench/run.py --out bench/results/h200    # run.json and run.png are written there

Every variant starts from the same weights and sees the same batches of real text. naive and sdpa
are nanoGPT's step as its users run it: whole logits, PyTorch's cross-entropy, AdamW fused on CUDA;
fastgpt is that step with ``fastgpt.GPT`` in it; fastgpt_train is the update of ``fastgpt train``:
bfloat16 weights over float32 masters, as one CUDA graph. The fp8 variants have other numbers and
are measured only when they are named. One step is: the next batch from host to device, forward,
backward, gradient clipping, AdamW; the host reads no loss.

1. fp32 reference: ``loss_steps`` steps of nanoGPT's model, eager and with masked matmul attention,
   in float32, for the losses alone.
2. Each variant alone on the device: the time to its first step, ``loss_steps`` losses, and the peak
   of allocated memory over those steps but the first.
3. All variants side by side: built again, warmed up for ``warmup`` steps, then ``rounds`` rounds in
   which each takes a turn of ``steps`` timed steps, after two that are not timed.

The time to the first step begins before the model is built and ends when the device has done the
first step: drawing the weights on the host, moving them, compiling, and one step. Cold: dynamo is
reset, and the folders in which torch.compile and Triton keep what they compile are new and empty;
on a GPU torch.compile was loaded before. What an earlier variant of the process compiled stays in
memory, though: of the fastgpt variants the first alone compiles its kernels. Warm: the second time,
with those folders full. Starting Python and importing torch is in neither.
"""

import gc
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import _command
import _machine
import _report
import torch
from _report import Result
from _timing import Clock, interleaved, synchronize
from _training import (
    CPU_OPTIONS,
    VARIANTS,
    Options,
    Plan,
    ReferenceTraining,
    Training,
    Variant,
    compiled_code_in,
    load_compiler,
    tf32,
    why_not,
)
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from fastgpt import GPT
from fastgpt.corpus import prepare_builtin
from fastgpt.data import token_files

_UNTIMED = 2  # steps at the start of a turn, in which the allocator finds its blocks again
_PROTOCOL = {"loss_steps": 100, "warmup": 20, "rounds": 5, "steps": 20}  # at least


def _why_not(plan: Plan, name: str) -> str | None:
    return why_not(VARIANTS[name], plan.device, plan.config.bias)


def _free_memory(device: torch.device) -> None:
    """What earlier variants left behind, references in a circle included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first_step(variant: Variant, plan: Plan) -> tuple[Training, Tensor, float]:
    """A new training, the loss of its first step, and the seconds until that was done."""
    synchronize(plan.device)
    start = time.perf_counter()
    training = Training(variant, plan)
    loss = training.step()
    synchronize(plan.device)
    return training, loss, time.perf_counter() - start


def _measure_alone(variant: Variant, plan: Plan, result: Result) -> None:
    on_gpu = plan.device.type == "cuda"
    torch.compiler.reset()
    _free_memory(plan.device)
    before = torch.cuda.memory_allocated() if on_gpu else 0
    training, loss, result.cold_start_s = _first_step(variant, plan)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    losses = [loss, *(training.step() for _ in range(plan.options.loss_steps - 1))]
    result.losses = _finite(losses)
    if on_gpu:
        result.peak_memory_bytes = torch.cuda.max_memory_allocated() - before


def _reference_losses(plan: Plan) -> list[float]:
    training = ReferenceTraining(plan)
    losses = [training.step() for _ in range(plan.options.loss_steps)]
    return _finite(losses)


def _finite(losses: list[Tensor]) -> list[float]:
    """The losses on the host; FloatingPointError where one is not finite, since the speed of a
    training that diverged says nothing.
    """
    values: list[float] = torch.stack(losses).tolist()
    for step, loss in enumerate(values, start=1):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}")
    return values


def _turn(training: Training, steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each of ``steps`` steps."""
    for _ in range(_UNTIMED):
        training.step()
    clock = Clock(device)
    clock.mark()
    for _ in range(steps):
        training.step()
        clock.mark()
    return clock.durations_ms()


class Measurement:
    """All of a run: fills ``results`` and ``reference_losses``."""

    def __init__(self, plan: Plan, folder: Path, progress: Progress) -> None:
        self.plan = plan
        self.results: dict[str, Result] = {
            name: Result(VARIANTS[name].label, _why_not(plan, name))
            for name in plan.options.variants
        }
        self.reference_losses: list[float] = []
        self._folder = folder  # for compiled code
        self._progress = progress
        self._task = progress.add_task("", total=1 + len(self.results) * (2 + plan.options.rounds))

    def run(self) -> None:
        self._show("float32 reference")
        with tf32(False):
            self.reference_losses = _reference_losses(self.plan)
        with tf32(True):
            if self.plan.device.type == "cuda":
                with compiled_code_in(self._folder / "none"):
                    load_compiler(self.plan.device)
            for name in self._going():
                self._show(f"{name}: first steps")
                with self._variant(name):
                    _measure_alone(VARIANTS[name], self.plan, self.results[name])
            torch.compiler.reset()
            self._measure_side_by_side()

    def _measure_side_by_side(self) -> None:
        trainings: dict[str, Training] = {}
        for name in self._going():
            self._show(f"{name}: warm-up")
            _free_memory(self.plan.device)
            with self._variant(name):
                training, _, self.results[name].warm_start_s = _first_step(
                    VARIANTS[name], self.plan
                )
                for _ in range(self.plan.options.warmup - 1):
                    training.step()
                trainings[name] = training
        for number, name in interleaved(list(trainings), self.plan.options.rounds):
            self._show(f"{name}: round {number + 1} of {self.plan.options.rounds}")
            if name not in trainings:
                continue
            with self._variant(name):
                times = _turn(trainings[name], self.plan.options.steps, self.plan.device)
                self.results[name].step_ms.append(times)
            if self.results[name].failure is not None:
                del trainings[name]

    def _going(self) -> list[str]:
        return [name for name, result in self.results.items() if result.failure is None]

    def _show(self, text: str) -> None:
        # The bar is drawn here only, never by a thread of its own beside a timed step.
        self._progress.update(self._task, advance=1, description=text, refresh=True)

    @contextmanager
    def _variant(self, name: str) -> Iterator[None]:
        """To run out of memory, or to diverge, ends a variant, not the run."""
        try:
            with compiled_code_in(self._folder / name):
                yield
        except torch.OutOfMemoryError:
            self.results[name].failure = "out of memory"
        except FloatingPointError as error:
            self.results[name].failure = str(error)


def _notes(plan: Plan) -> list[str]:
    """What sets this run apart from the protocol."""
    notes = []
    if plan.device.type == "cpu":
        notes.append(f"{_report.CPU_NOTE}: fastgpt runs PyTorch's own ops there")
    few = {key: n for key in _PROTOCOL if (n := getattr(plan.options, key)) < _PROTOCOL[key]}
    if few:
        given = ", ".join(f"{key}={n}" for key, n in few.items())
        least = ", ".join(str(_PROTOCOL[key]) for key in few)
        notes.append(f"short run: {given}; protocol: at least {least}")
    return notes


def _parameters(plan: Plan) -> int:
    with torch.device("meta"):
        return GPT(plan.config).get_num_params()


def _data_facts(plan: Plan) -> dict[str, Any]:
    given = plan.options.data_dir
    return {
        "source": "built-in corpus" if given is None else given.resolve().name,
        "train_tokens": sum(map(len, token_files(plan.data_dir, "train"))),
    }


def _measure(plan: Plan, folder: Path, console: Console) -> dict[str, Any]:
    o = plan.options
    run: dict[str, Any] = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "notes": _notes(plan),
        "machine": _machine.facts(plan.device),
        "options": {
            key: value for key, value in asdict(o).items() if key not in ("data_dir", "out")
        },
        "dtype": str(plan.dtype).removeprefix("torch."),
        "parameters": _parameters(plan),
        "data": _data_facts(plan),
        "sdpa": None,
    }
    if plan.device.type == "cuda":
        run["sdpa"] = _machine.sdpa_kernel(
            plan.device, plan.dtype, o.batch_size, o.block_size, o.n_head, o.n_embd
        )
    before = _machine.ceilings(plan.device)
    with Progress(console=console, auto_refresh=False, transient=True) as progress:
        measurement = Measurement(plan, folder, progress)
        measurement.run()
    run["ceilings"] = {"before": before, "after": _machine.ceilings(plan.device)}
    return run | _report.record(
        measurement.results, measurement.reference_losses, plan.tokens_per_step
    )


def _planned(argv: list[str] | None, folder: Path) -> tuple[Plan, Path]:
    """What is to be measured and the folder for the results. All that a user can get wrong is
    found here.
    """
    options = _command.options(Options() if torch.cuda.is_available() else CPU_OPTIONS, argv)
    if options.data_dir is None:
        plan = Plan.of(options, prepare_builtin(folder / "data").data_dir)
    else:
        plan = Plan.of(options, options.data_dir)
    plan.batches(options.vocab_size)
    with torch.device("meta"):
        for name in options.variants:
            if _why_not(plan, name) is None:  # then fp8 may still refuse the sizes
                GPT(plan.config, fp8=VARIANTS[name].fp8)
    out = options.out
    if out is None:
        now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")
        out = _machine.ROOT / "bench" / "out" / now
    return plan, _command.results_folder(out, "run")


def main(argv: list[str] | None = None) -> int:
    """Measure, write run.json and run.png, print the table; the exit code: 0, or 2 for a wrong
    argument or data set, without matplotlib, or where the float32 reference cannot be trained.
    """
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            plan, out = _planned(argv, folder)
        except _command.USER_ERRORS as error:
            return _command.failed(error)
        if plan.device.type == "cpu":
            # At this size threads only wait for each other, and the longer the busier the machine.
            torch.set_num_threads(1)
            console.print("No CUDA GPU: a small size on the CPU, in one thread.")
        try:
            run = _measure(plan, folder, console)
        except (FloatingPointError, torch.OutOfMemoryError) as error:  # a variant's ends nothing
            return _command.failed(
                f"the float32 reference cannot be trained: {error}; try a smaller learning_rate, "
                "batch_size or model"
            )
    _command.write_results(out, "run", run, _report.chart, console)
    console.print(_report.table(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
