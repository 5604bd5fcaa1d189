"""Decides the lines of the launch tables for a model, one after the other."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch

from fastgpt import ops as default_ops
from fastgpt._files import exclusive_lock
from fastgpt.kernels import configs, tuned_table
from fastgpt.kernels.candidates import same
from fastgpt.kernels.compile_ahead import compile_ahead
from fastgpt.kernels.configs import Key
from fastgpt.timing import Occupier, interleaved, milliseconds, synchronize
from fastgpt.tuning.phase import Phase, Right, asked_by
from fastgpt.tuning.table import Line, Table, choices, name_of
from fastgpt.tuning.workload import Workload, calls_of

ROUNDS = 10
LEAST_GAIN = 1.01

Show = Callable[[str], None]


class Tuner:
    """Decides one line after the other."""

    def __init__(self, table: Table, show: Show) -> None:
        self._table, self._device, self._show = table, table.device, show
        lines = {key: line.config for key, line in table.lines.items()}
        self._lines = configs.use_tuned(table.device, lines)
        self._occupy = Occupier(table.device)

    def decide(self, key: Key, phases: Sequence[Phase]) -> Line:
        """Check and time the candidates of a line. What is decided is in effect and written."""
        present, *others = choices(key, self._device)
        with self._using(key, present):
            right = {id(phase.call): phase.right() for phase in phases}
        self._compile(key, phases, others)
        good = [present, *(c for c in others if self._passes(key, c, phases, right))]
        right.clear()
        ms = self._times(key, phases, good)
        best, noise = verdict(ms)
        at = sorted(map(str, phases))
        line = Line(key, good[best], at, ms[best], ms[0], noise, len(good))
        self._lines[key], self._table.lines[key] = line.config, line
        self._table.write()
        return line

    @contextmanager
    def _using(self, key: Key, config: Any) -> Iterator[None]:
        """Within, launches take ``config`` for this line."""
        before = {key: self._lines[key]} if key in self._lines else {}
        self._lines[key] = config
        try:
            yield
        finally:
            del self._lines[key]
            self._lines.update(before)

    def _compile(self, key: Key, phases: Sequence[Phase], tried: Sequence[Any]) -> None:
        def call(config: Any, phase: Phase) -> None:
            with self._using(key, config), suppress(Exception):  # it fails again where it counts
                phase.run()

        compile_ahead(partial(call, config, phase) for config in tried for phase in phases)

    def _passes(
        self, key: Key, config: Any, phases: Sequence[Phase], right: Mapping[int, Right]
    ) -> bool:
        """Whether a candidate is right; one that is not is written down and shown."""
        why = self._table.why_not(key, config)
        if why is None:
            try:
                with self._using(key, config):
                    for phase in phases:
                        phase.check(right[id(phase.call)])
                return True
            except Exception as error:  # Triton, MLIR and ptxas share no class for what they refuse
                lines = str(error).strip().splitlines()
                why = ": ".join([type(error).__name__, *lines[:1]])
                if not isinstance(error, torch.OutOfMemoryError):  # that may be different next time
                    self._table.rejected.append((key, config, why))
                    self._table.write()
            self._check_device(config)
        self._show(f"{name_of(key)}: {config} is left out: {why}")
        return False

    def _check_device(self, config: Any) -> None:
        """An illegal address leaves a process without its GPU."""
        try:
            synchronize(self._device)
        except RuntimeError as error:
            raise RuntimeError(
                f"the GPU failed with {config}, which will be left out: tune again to go on"
            ) from error

    def _times(self, key: Key, phases: Sequence[Phase], good: Sequence[Any]) -> dict[int, float]:
        """Milliseconds of all phases in a training step with each configuration, by its number; -1:
        with the present one, a second time."""
        total = dict.fromkeys(range(-1, len(good)), 0.0)
        for phase in phases:
            found: dict[int, list[float]] = {number: [] for number in total}
            for _, number in interleaved(list(total), ROUNDS):
                with self._using(key, good[max(number, 0)]):
                    work = phase.prepared()
                    self._occupy()
                    found[number].append(milliseconds(work, self._device))
            for number, ms in found.items():
                total[number] += phase.count * statistics.median(ms)
        return total

    def once(self, phase: Phase) -> float:
        """About how long a phase takes, in a training step."""
        phase.run()
        work = phase.prepared()
        self._occupy()
        return phase.count * milliseconds(work, self._device)


def verdict(ms: Mapping[int, float]) -> tuple[int, float]:
    """The number of the best candidate, 0 for the present one, and the noise: how many times the
    present one's two measurements, 0 and -1, differ. It wins by more than that and by 1%."""
    noise = max(ms[-1], ms[0]) / min(ms[-1], ms[0])
    best = min((number for number in ms if number >= 0), key=ms.__getitem__)
    wins = ms[0] / ms[best] > max(noise, LEAST_GAIN)
    return (best if wins else 0), noise


def tune(
    work: Workload,
    device: torch.device,
    *,
    seconds: float = 180.0,
    only_missing: bool = False,
    ops: ModuleType = default_ops,
    show: Show = print,
    progress: Callable[..., None] = lambda fraction, text="": None,
) -> tuple[Table, int]:
    """Choose the launch configurations for a model on this device, write them to its file, and use
    them in this process from now on.

    Args:
        work: the model.
        device: a CUDA GPU.
        seconds: begin no further line after that.
        only_missing: take a line that is in the file as it is; else only if it was measured with
            the same shapes.
        ops: as for ``GPT``.
        show: gets a line of text for each candidate that is left out.
        progress: ``progress(fraction, text)``.

    Returns:
        The table, with lines for other models if there are any, and how many lines of this model
        are not decided yet.

    Raises:
        ValueError: ``seconds`` is negative, ``FASTGPT_TUNED`` is empty, or another process is
            tuning.
        OSError: the file cannot be written.
        RuntimeError: a candidate made the GPU fail; what was decided is kept.
    """
    if not seconds >= 0:
        raise ValueError(f"seconds must be at least 0, got {seconds}")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    deadline = time.monotonic() + seconds
    path = tuned_table.path_of(device)
    if path is None:
        named = os.environ.get(tuned_table.VARIABLE)
        raise ValueError(f"{tuned_table.VARIABLE} must name a folder for tuning, got {named!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    on_gpu = device.type == "cuda"
    with (
        exclusive_lock(path.parent),
        torch.random.fork_rng([device.index] if on_gpu else []),
        torch.cuda.device(device) if on_gpu else nullcontext(),
    ):
        table = Table.read(device)
        tuner = Tuner(table, show)
        progress(None, "looking at the model")
        phases = [
            Phase(call, count, backward, ops)
            for call, count in calls_of(work, device, ops)
            for backward in ((False, True) if call.op != "adamw" else (False,))
        ]
        dropping = [phase for phase in phases if phase.drops and phase.backward]
        compile_ahead([*(phase.run for phase in phases), *(phase.right for phase in dropping)])
        times = {phase: tuner.once(phase) for phase in phases}
        done, too_large = 0, set[Key]()
        while True:
            found = _left(table, phases, times, only_missing)
            left = [(key, at) for key, at in found if key not in too_large]
            if not left or time.monotonic() >= deadline:
                break
            for key, at in left:
                if time.monotonic() >= deadline:
                    break
                progress(done / (done + len(left)), name_of(key))
                done += 1
                try:
                    line = tuner.decide(key, at)
                except torch.OutOfMemoryError:
                    show(f"{name_of(key)}: too little memory to measure it")
                    too_large.add(key)
                    continue
                if not same(line.config, choices(key, device)[0]):
                    break  # other kernels may be launched now
        if not left and str(work) not in table.workloads:
            table.workloads.append(str(work))
            table.write()
    return table, len(left)


def _left(
    table: Table, phases: Sequence[Phase], times: Mapping[Phase, float], only_missing: bool
) -> list[tuple[Key, list[Phase]]]:
    """The lines that are not decided, and the phases that ask for them: the most time first."""
    asking: dict[Key, list[Phase]] = {}
    for phase in phases:
        for key in asked_by(phase):
            asking.setdefault(key, []).append(phase)
    left = []
    for key, at in asking.items():
        line = table.lines.get(key)
        decided = line is not None and (only_missing or line.at == sorted(map(str, at)))
        if not decided and len(choices(key, table.device)) > 1:
            left.append((key, at))
    return sorted(left, key=lambda one: -sum(times[phase] for phase in one[1]))
