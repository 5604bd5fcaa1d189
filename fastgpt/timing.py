"""Timing of work on a device: timestamps, cold caches, interleaved measurements."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_SCRATCH_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # more than the last level of cache
_FILLS = {"cuda": 16, "cpu": 1}  # 4 ms on an H200; the host needs up to 1 ms to launch an op


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Measures the device's time between marks.

    On CUDA a mark is an event in the current stream, so the host runs ahead as in training. On
    other devices, where calls are synchronous, it is the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def durations_ms(self) -> list[float]:
        """Milliseconds between consecutive marks; waits for the device."""
        synchronize(self._device)
        if self._device.type == "cuda":
            events = itertools.pairwise(self._events)
            return [start.elapsed_time(end) for start, end in events]
        return [1e3 * (end - start) for start, end in itertools.pairwise(self._times)]


def interleaved(items: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Yield (round, item). Every round visits all items and starts one item later than the previous
    one, so that drift of the machine affects all items equally and none is always first.
    """
    for number in range(rounds):
        for offset in range(len(items)):
            yield number, items[(number + offset) % len(items)]


class Occupier:
    """Call it before the timed work: it flushes the cache and, on a GPU, queues some milliseconds
    of work. The host then launches the timed work before the GPU gets to it, so that the events
    measure the GPU's time and not the host's launch overhead, which is longer for a small op."""

    def __init__(self, device: torch.device) -> None:
        n_bytes = _SCRATCH_BYTES["cuda" if device.type == "cuda" else "cpu"]
        self._scratch = torch.empty(n_bytes, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        for _ in range(_FILLS["cuda" if self._scratch.is_cuda else "cpu"]):
            self._scratch.fill_(1)


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    """The device's time for one call of ``work``."""
    clock = Clock(device)
    clock.mark()
    result = work()
    clock.mark()
    (found,) = clock.durations_ms()
    del result  # after the last mark: freeing the autograd graph is not part of the work
    return found
