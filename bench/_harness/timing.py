"""How every benchmark takes times and summarises them."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of a measured quantity."""

    median: float
    p10: float
    p90: float


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError without a value."""
    if not values:
        raise ValueError("values must hold at least one measurement, got none")
    median, p10, p90 = np.percentile(values, [50, 10, 90])
    return Spread(float(median), float(p10), float(p90))


def rate(ms: Spread, amount: float) -> Spread:
    """``amount`` per second, if it takes ``ms`` milliseconds. The 90th percentile of the times
    gives the 10th of the rates."""
    return Spread(1e3 * amount / ms.median, 1e3 * amount / ms.p90, 1e3 * amount / ms.p10)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """The device's time from mark to mark.

    On CUDA a mark is an event in the current stream, so the host runs ahead as in training.
    Elsewhere, where work is done when a call returns, it is the host's clock.
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
        """Milliseconds between neighbouring marks; waits for the device."""
        synchronize(self._device)
        if self._device.type == "cuda":
            pairs = zip(self._events, self._events[1:], strict=False)
            return [start.elapsed_time(end) for start, end in pairs]
        return [1e3 * float(seconds) for seconds in np.diff(self._times)]


def interleaved(items: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(round, item): every round visits every item once and begins one item later than the round
    before, so that a drift of the machine affects all items and none is always first.
    """
    for number in range(rounds):
        for place in range(len(items)):
            yield number, items[(number + place) % len(items)]
