"""The measurements of ``run.py``: the float32 reference, each variant alone, then all side by side.
An error ends only the variant that raised it."""

import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from bench._harness.cli import failure_of
from bench._step.report import Group, Result
from bench._step.variants import (
    VARIANTS,
    Plan,
    ReferenceTraining,
    Training,
    Variant,
    compiled_code_in,
    load_compiler,
    tf32,
    why_not,
)
from fastgpt.timing import Clock, interleaved, synchronize

_UNTIMED = 2  # steps at the start of a turn, to warm up the allocator and caches
# The first of these that can be measured is the base of every group.
_BASES = ("sdpa_compile", "sdpa", "fastgpt")
_SHARE_OF_FREE_MEMORY = 0.9  # for a group; the rest is for loaded kernels and fragmentation


def unsupported(plan: Plan, name: str) -> str | None:
    return why_not(VARIANTS[name], plan.device, plan.config.bias)


# ------------------------------------------------------------------------------------- GPU memory


@dataclass(frozen=True)
class Footprint:
    """Bytes of GPU memory that a training holds between steps (including a CUDA graph's pool), and
    their peak within a step."""

    kept: int = 0
    peak: int = 0


def groups_that_fit(
    names: Sequence[str], base: str, footprints: Mapping[str, Footprint], capacity: float
) -> list[list[str]]:
    """Split the variants, in order, into groups of at most ``capacity`` bytes that each start with
    ``base``. A variant that does not fit next to the base shares a group with it alone."""
    groups = [[base]]
    for name in names:
        if name == base:
            continue
        members = [footprints[member] for member in (*groups[-1], name)]
        needed = sum(f.kept for f in members) + max(f.peak - f.kept for f in members)
        if needed > capacity and len(groups[-1]) > 1:
            groups.append([base])
        groups[-1].append(name)
    return groups


def _free_memory(device: torch.device) -> None:
    """Free the GPU memory of earlier variants: reference cycles, cached blocks, graph pools."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _capacity(device: torch.device) -> float:
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    return _SHARE_OF_FREE_MEMORY * free


# ------------------------------------------------------------------------------------ one variant


def _first_step(variant: Variant, plan: Plan) -> tuple[Training, Tensor, float]:
    """A new training, the loss of its first step, and the seconds that both took."""
    synchronize(plan.device)
    start = time.perf_counter()
    training = Training(variant, plan)
    loss = training.step()
    synchronize(plan.device)
    return training, loss, time.perf_counter() - start


def _measure_alone(variant: Variant, plan: Plan, result: Result) -> Footprint:
    on_gpu = plan.device.type == "cuda"
    torch.compiler.reset()
    _free_memory(plan.device)
    if on_gpu:
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    training, loss, result.cold_start_s = _first_step(variant, plan)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses = [loss, *(training.step() for _ in range(plan.options.loss_steps - 1))]
    result.losses = _finite(losses)
    if not on_gpu:
        return Footprint()
    result.peak_memory_bytes = torch.cuda.max_memory_allocated() - allocated
    peak = torch.cuda.max_memory_reserved() - reserved
    torch.cuda.empty_cache()
    return Footprint(torch.cuda.memory_reserved() - reserved, peak)


def _reference_losses(plan: Plan) -> list[float]:
    training = ReferenceTraining(plan)
    losses = [training.step() for _ in range(plan.options.loss_steps)]
    return _finite(losses)


def _finite(losses: list[Tensor]) -> list[float]:
    """The losses on the host. Raises FloatingPointError if one is not finite, since the speed of a
    diverged training is meaningless."""
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


# ---------------------------------------------------------------------------------- the whole run


class Measurement:
    """A whole run, which fills ``results``, ``reference_losses`` and ``groups``."""

    def __init__(
        self, plan: Plan, folder: Path, progress: Progress, save: Callable[["Measurement"], None]
    ) -> None:
        self.plan = plan
        self.results: dict[str, Result] = {
            name: Result(VARIANTS[name].label, unsupported(plan, name))
            for name in plan.options.variants
        }
        self.reference_losses: list[float] = []
        self.reference_failure: str | None = None
        self.groups: list[Group] = []
        self._footprints: dict[str, Footprint] = {}
        self._folder = folder  # for compiled code
        self._save = save
        self._progress = progress
        self._task = progress.add_task("", total=1 + len(self.results) * (2 + plan.options.rounds))

    def run(self) -> None:
        """Raises FloatingPointError if the float32 reference diverges, as every variant would."""
        if self.plan.has_reference:
            self._show("float32 reference")
            with tf32(False):
                self._measure_reference()
        with tf32(True):
            if self.plan.device.type == "cuda":
                with compiled_code_in(self._folder / "none"):
                    load_compiler(self.plan.device)
            for name in self._measurable():
                self._show(f"{name}: first steps")
                with self._variant(name):
                    self._footprints[name] = _measure_alone(
                        VARIANTS[name], self.plan, self.results[name]
                    )
                self._save(self)
            self._measure_side_by_side()

    def _measure_reference(self) -> None:
        try:
            self.reference_losses = _reference_losses(self.plan)
        except FloatingPointError:
            raise
        except Exception as error:  # the variants are still measured, whatever the error
            self.reference_failure = failure_of(error)
            traceback.print_exc()
        self._save(self)

    def _measure_side_by_side(self) -> None:
        names = self._measurable()
        if not names:
            return
        base = next((name for name in _BASES if name in names), names[0])
        torch.compiler.reset()
        _free_memory(self.plan.device)
        planned = groups_that_fit(names, base, self._footprints, _capacity(self.plan.device))
        turns = len(planned) - 1 + len(names)
        self._progress.update(
            self._task, total=1 + len(self.results) + turns * (1 + self.plan.options.rounds)
        )
        for members in planned:
            members = [name for name in members if self.results[name].failure is None]
            self.groups.append(Group(base, members))
            self._measure_group(self.groups[-1])
            torch.compiler.reset()
            _free_memory(self.plan.device)

    def _measure_group(self, group: Group) -> None:
        options = self.plan.options
        first = group is self.groups[0]
        trainings: dict[str, Training] = {}
        for name in group.variants:
            self._show(f"{name}: warm-up")
            _free_memory(self.plan.device)
            with self._variant(name):
                trainings[name], seconds = self._warmed_up(name)
                if first or name != group.base:
                    self.results[name].warm_start_s = seconds
        for number, name in interleaved(list(trainings), options.rounds):
            self._show(f"{name}: round {number + 1} of {options.rounds}")
            if name not in trainings:
                continue
            went_well = False
            with self._variant(name):
                times = _turn(trainings[name], options.steps, self.plan.device)
                if name == group.base:
                    group.base_step_ms.append(times)
                if first or name != group.base:
                    self.results[name].step_ms.append(times)
                went_well = True
            if not went_well:
                del trainings[name]
                _free_memory(self.plan.device)
            self._save(self)

    def _warmed_up(self, name: str) -> tuple[Training, float]:
        """A warmed-up training, and the seconds until its first step was done."""
        training, _, seconds = _first_step(VARIANTS[name], self.plan)
        for _ in range(self.plan.options.warmup - 1):
            training.step()
        return training, seconds

    def _measurable(self) -> list[str]:
        return [name for name, result in self.results.items() if result.failure is None]

    def _show(self, text: str) -> None:
        # Drawn here, not by a thread, which would run during timed steps.
        self._progress.update(self._task, advance=1, description=text, refresh=True)

    @contextmanager
    def _variant(self, name: str) -> Iterator[None]:
        """Record an exception as the variant's failure and continue with the others."""
        try:
            with compiled_code_in(self._folder / name):
                yield
        except Exception as error:  # the other variants are still measured, whatever the error
            result = self.results[name]
            # A base that fails in a later group keeps its results from the first.
            is_new = len(result.step_ms) < self.plan.options.rounds
            if is_new:
                result.failure = failure_of(error)
            if not (is_new and isinstance(error, (torch.OutOfMemoryError, FloatingPointError))):
                traceback.print_exc(file=sys.stderr)
