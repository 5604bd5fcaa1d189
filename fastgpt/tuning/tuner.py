"""Decides the entries of the launch tables for a model, one at a time."""

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
from fastgpt.tuning.phase import Expected, Phase, asked_by
from fastgpt.tuning.table import Line, Table, choices, name_of
from fastgpt.tuning.workload import Workload, calls_of

ROUNDS = 10
LEAST_GAIN = 1.01

Show = Callable[[str], None]


class Tuner:
    """Checks and times candidates, one entry of the launch tables at a time."""

    def __init__(self, table: Table, show: Show) -> None:
        self._table, self._device, self._show = table, table.device, show
        lines = {key: line.config for key, line in table.lines.items()}
        self._lines = configs.use_tuned(table.device, lines)
        self._occupy = Occupier(table.device)

    def decide(self, key: Key, phases: Sequence[Phase]) -> Line:
        """Check and time the candidates for an entry, then apply and write the best."""
        present, *others = choices(key, self._device)
        with self._using(key, present):
            expected = {id(phase.call): phase.expected() for phase in phases}
        self._compile(key, phases, others)
        good = [present, *(c for c in others if self._passes(key, c, phases, expected))]
        expected.clear()
        ms = self._times(key, phases, good)
        best, noise = verdict(ms)
        at = sorted(map(str, phases))
        line = Line(key, good[best], at, ms[best], ms[0], noise, len(good))
        self._lines[key], self._table.lines[key] = line.config, line
        self._table.write()
        return line

    @contextmanager
    def _using(self, key: Key, config: Any) -> Iterator[None]:
        """Within the block, launches use ``config`` for this entry."""
        before = {key: self._lines[key]} if key in self._lines else {}
        self._lines[key] = config
        try:
            yield
        finally:
            del self._lines[key]
            self._lines.update(before)

    def _compile(self, key: Key, phases: Sequence[Phase], tried: Sequence[Any]) -> None:
        def call(config: Any, phase: Phase) -> None:
            with self._using(key, config), suppress(Exception):  # raised again in _passes
                phase.run()

        compile_ahead(partial(call, config, phase) for config in tried for phase in phases)

    def _passes(
        self, key: Key, config: Any, phases: Sequence[Phase], expected: Mapping[int, Expected]
    ) -> bool:
        """Whether a candidate's results are correct. If not, record it as rejected and show why."""
        why = self._table.why_not(key, config)
        if why is None:
            try:
                with self._using(key, config):
                    for phase in phases:
                        phase.check(expected[id(phase.call)])
                return True
            except Exception as error:  # the errors of Triton, MLIR and ptxas share no class
                lines = str(error).strip().splitlines()
                why = ": ".join([type(error).__name__, *lines[:1]])
                if not isinstance(error, torch.OutOfMemoryError):  # may succeed next time
                    self._table.rejected.append((key, config, why))
                    self._table.write()
            self._check_device(config)
        self._show(f"{name_of(key)}: rejected {config}: {why}")
        return False

    def _check_device(self, config: Any) -> None:
        """Raise RuntimeError if the GPU is unusable, as after an illegal address."""
        try:
            synchronize(self._device)
        except RuntimeError as error:
            raise RuntimeError(
                f"the GPU failed with {config}, which is now rejected: tune again to continue"
            ) from error

    def _times(self, key: Key, phases: Sequence[Phase], good: Sequence[Any]) -> dict[int, float]:
        """Milliseconds of all phases in a training step with each configuration, by its number; -1
        is a second measurement of the current one, number 0."""
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
        """A rough measurement of a phase's milliseconds in a training step."""
        phase.run()
        work = phase.prepared()
        self._occupy()
        return phase.count * milliseconds(work, self._device)


def verdict(ms: Mapping[int, float]) -> tuple[int, float]:
    """The number of the best candidate, and the noise: the ratio of the current configuration's two
    measurements, 0 and -1. Another one wins only by more than the noise and by more than 1%."""
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
    """Choose the launch configurations for a model on this device, write them to the device's file,
    and use them in this process from now on.

    Args:
        work: the model.
        device: a CUDA GPU.
        seconds: do not start on another entry after this time.
        only_missing: keep all entries that are in the file; otherwise only those that were measured
            with the same shapes.
        ops: as for ``GPT``.
        show: called with a line of text for each rejected candidate.
        progress: called as ``progress(fraction, text)``.

    Returns:
        The table, including entries for other models, and the number of entries of this model that
        are still undecided.

    Raises:
        ValueError: ``seconds`` is negative, ``FASTGPT_TUNED`` is empty, or another process is
            tuning.
        OSError: the file cannot be written.
        RuntimeError: a candidate made the GPU fail; earlier decisions are kept.
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
        progress(None, "analyzing the model")
        phases = [
            Phase(call, count, backward, ops)
            for call, count in calls_of(work, device, ops)
            for backward in ((False, True) if call.op != "adamw" else (False,))
        ]
        dropping = [phase for phase in phases if phase.drops and phase.backward]
        compile_ahead([*(phase.run for phase in phases), *(phase.expected for phase in dropping)])
        times = {phase: tuner.once(phase) for phase in phases}
        done, too_large = 0, set[Key]()
        while True:
            found = _undecided(table, phases, times, only_missing)
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
                    show(f"{name_of(key)}: not enough memory to measure it")
                    too_large.add(key)
                    continue
                if not same(line.config, choices(key, device)[0]):
                    break  # the new configuration may launch other kernels
        if not left and str(work) not in table.workloads:
            table.workloads.append(str(work))
            table.write()
    return table, len(left)


def _undecided(
    table: Table, phases: Sequence[Phase], times: Mapping[Phase, float], only_missing: bool
) -> list[tuple[Key, list[Phase]]]:
    """The undecided entries and the phases that look them up, those with the most time first."""
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
