"""Happens-before order of work on the device: vector clocks of the streams and the host."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

Clock = dict[int, int]  # stream → number of its last work known to be done


class Block(NamedTuple):
    """An allocation on the device."""

    address: int
    n_bytes: int
    generation: int  # unique to each allocation
    stream: int  # current at allocation
    of_graph: bool  # allocated during a capture


class _Use(NamedTuple):
    stream: int
    number: int
    what: str


@dataclass
class _History:
    """The last uses of a block."""

    owner: int
    write: _Use | None = None
    reads: dict[int, _Use] = field(default_factory=dict)  # since the write, by stream
    recorded: set[int] = field(default_factory=set)  # streams of record_stream

    def uses(self) -> list[_Use]:
        return [*self.reads.values(), *([self.write] if self.write else [])]


class Order:
    """Calls ``report(text)`` for each pair of unordered uses of which one is a write."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._host: Clock = {}
        self._streams: defaultdict[int, Clock] = defaultdict(dict)
        self._events: dict[int, Clock] = {}
        self._blocks: dict[int, _History] = {}  # by generation
        self._freed: defaultdict[int, list[_Use]] = defaultdict(list)  # by the memory's stream
        self._number = 0

    def record(self, event: int, stream: int) -> None:
        self._events[event] = dict(self._streams[stream])

    def wait(self, event: int, stream: int) -> None:
        _merge(self._streams[stream], self._events.get(event, {}))

    def host_waits_for_event(self, event: int) -> None:
        _merge(self._host, self._events.get(event, {}))

    def host_waits_for_stream(self, stream: int) -> None:
        _merge(self._host, self._streams[stream])

    def host_waits(self) -> None:
        for clock in self._streams.values():
            _merge(self._host, clock)

    def is_done(self, stream: int, number: int) -> bool:
        """Whether the host has waited for that work."""
        return self._host.get(stream, 0) >= number

    def work(self, what: str, stream: int, reads: Iterable[Block], writes: Iterable[Block]) -> int:
        """Add work to a stream, after all work that the host has waited for; return its number."""
        self._number += 1
        clock = self._streams[stream]
        _merge(clock, self._host)
        clock[stream] = self._number
        for use in self._freed.pop(stream, []):
            if clock.get(use.stream, 0) < use.number:
                self._report(
                    f"{what} on stream {stream} may get memory that was freed while {use.what} on "
                    f"stream {use.stream} used it: no record_stream"
                )
        use = _Use(stream, self._number, what)
        for block in reads:
            history = self._history(block)
            self._check(use, "reads", [history.write] if history.write else [])
            history.reads[stream] = use
        for block in writes:
            history = self._history(block)
            self._check(use, "writes", history.uses())
            history.write, history.reads = use, {}
        return self._number

    def record_stream(self, block: Block, stream: int) -> None:
        self._history(block).recorded.add(stream)

    def freed(self, generation: int) -> None:
        """From now on the allocator may give the block to the next work on its stream."""
        history = self._blocks.pop(generation, None)
        if history is not None:
            uses = [use for use in history.uses() if use.stream not in history.recorded]
            self._freed[history.owner] += uses

    def _history(self, block: Block) -> _History:
        history = self._blocks.get(block.generation)
        if history is None:
            history = self._blocks[block.generation] = _History(block.stream)
        return history

    def _check(self, use: _Use, does: str, earlier: list[_Use]) -> None:
        known = self._streams[use.stream]
        for other in earlier:
            if known.get(other.stream, 0) < other.number:
                self._report(
                    f"race: {use.what} on stream {use.stream} {does} what {other.what} on stream "
                    f"{other.stream} uses, without a wait between them"
                )


def _merge(into: Clock, other: Clock) -> None:
    for stream, number in other.items():
        into[stream] = max(into.get(stream, 0), number)
