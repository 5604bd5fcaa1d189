"""State of the pretended device: memory, errors, findings."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import _pretend_cuda as C  # type: ignore[import-not-found]  # before torch, which asks for it once
import torch
from torch import Tensor

from tests.tools.pretend_cuda.order import Block, Order

CAPABILITY = int(os.environ.get("PRETEND_CAPABILITY", "90"))  # 10 * major + minor

findings: list[str] = []

_HERE = os.path.dirname(__file__)
_INSTALLED = (str(Path(torch.__file__).parents[1]), os.path.dirname(os.__file__), "<")


def report(what: str) -> None:
    """Add a finding, with the program's stack, innermost line first."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(lines) < 4:
        file = frame.f_code.co_filename
        if os.path.dirname(file) != _HERE and not file.startswith(_INSTALLED):
            lines.append(f"{os.path.relpath(file)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    text = f"{what} ({' < '.join(lines) or 'in the backward pass'})"
    if text not in findings:
        findings.append(text)


order = Order(report)


def refuse_in_capture(what: str) -> None:
    if C.is_capturing():
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {what}")


def on_device(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_cuda


def block_at(address: int) -> Block | None:
    found = C.block_at(address) if address else None
    return None if found is None else Block(*found)


def blocks(tensors: Iterable[Tensor]) -> list[Block]:
    """Allocations of the tensors that are on the device."""
    found = [block_at(t.untyped_storage().data_ptr()) for t in tensors if on_device(t)]
    return list(dict.fromkeys(block for block in found if block is not None))


# --------------------------------------------------------------------------- order of the work


class CaptureEvents:
    """The stream of the capture in progress, and the events recorded on it."""

    stream = 0
    inside: set[int] = set()


def catch_up() -> None:
    """Process what happened in C++ since the last call, before any later work is added."""
    for what, a, b in C.happened():
        if what == "free":
            order.freed(b)
        elif what == "record_stream":
            if (block := block_at(a)) is not None:
                order.record_stream(block, b)
        elif C.is_capturing():
            _in_capture(what, a, b)
        elif what == "record":
            order.record(a, b)
        elif what == "wait":
            order.wait(a, b)
        elif what == "synchronize":
            order.host_waits()
        elif what == "synchronize stream":
            order.host_waits_for_stream(b)
        else:
            order.host_waits_for_event(a)
    _finish_copies()


def _in_capture(what: str, event: int, stream: int) -> None:
    captured = stream == CaptureEvents.stream
    if what == "record" and captured:
        CaptureEvents.inside.add(event)
    elif what == "record":
        CaptureEvents.inside.discard(event)
    elif captured and event not in CaptureEvents.inside:
        report("a capture waits for work outside of it")
    elif not captured and event in CaptureEvents.inside:
        report(f"stream {stream} waits for work in a capture: only one stream can be followed")


def work(what: str, reads: Iterable[Tensor], writes: Iterable[Tensor]) -> int:
    """Add work on the current stream; return its number."""
    stream = C.current_stream()
    if not C.is_capturing():
        return order.work(what, stream, blocks(reads), blocks(writes))
    if stream != CaptureEvents.stream:
        report(f"{what} on stream {stream} while stream {CaptureEvents.stream} is capturing")
    return 0


class Waiting:
    """``torch.cuda.set_sync_debug_mode``: 2 forbids implicit synchronisation of the host."""

    mode = 0

    @classmethod
    def set_mode(cls, mode: int) -> None:
        cls.mode = mode


def host_waits_for_current_stream() -> None:
    if Waiting.mode == 2:
        raise RuntimeError("called a synchronizing CUDA operation")
    C.tell("synchronize stream", 0, C.current_stream())
    catch_up()


# ------------------------------------------------------------------- copies the host runs ahead of


@dataclass
class _Copy:
    """A non_blocking copy between the device and pinned memory that the host has not waited for.

    It happens as late as possible: a copy to the host is made once the host has waited for it,
    and until then the source of a copy from the host must not change.
    """

    stream: int
    number: int
    pinned: Tensor
    value: Tensor  # what arrives on the host, or what the device has read
    to_host: bool

    def finish(self) -> None:
        if self.to_host:
            self.pinned.copy_(self.value)
        elif not _same_bits(self.pinned, self.value):
            report(f"pinned memory {tuple(self.pinned.shape)} was changed before its copy was done")


_copies: list[_Copy] = []


def copy_starts(number: int, pinned: Tensor, value: Tensor, to_host: bool) -> None:
    """``value`` must not alias other tensors."""
    if to_host:
        _poison(pinned)
    _copies.append(_Copy(C.current_stream(), number, pinned, value, to_host))


def _finish_copies() -> None:
    for copy in [c for c in _copies if order.is_done(c.stream, c.number)]:
        _copies.remove(copy)
        copy.finish()


def _poison(t: Tensor) -> None:
    if t.dtype == torch.bool:
        t.fill_(True)
    else:
        t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    bits = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(*bits)


def end() -> list[str]:
    """Return and clear all findings, at the end of a program or a test."""
    catch_up()
    for copy in _copies:
        if copy.to_host:
            report("the host never waits for a non_blocking copy to it")
        else:
            copy.finish()
    _copies.clear()
    found = findings.copy()
    findings.clear()
    return found
