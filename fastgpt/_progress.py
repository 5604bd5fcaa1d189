"""Progress bars for work that walks over a long array."""

from collections.abc import Iterator

from rich.console import Console
from rich.progress import track

SPAN = 1 << 22  # items at a time: a few milliseconds of work and at most 32 MB of int64
_SPANS_WITHOUT_BAR = 32  # about a second of work


def spans(total: int, description: str) -> Iterator[slice]:
    """Slices of at most ``SPAN`` items that cover ``range(total)`` in order, with a bar on stderr
    where there are many.
    """
    starts = range(0, total, SPAN)
    for start in track(
        starts,
        description,
        console=Console(stderr=True),
        transient=True,
        disable=len(starts) <= _SPANS_WITHOUT_BAR,
    ):
        yield slice(start, min(start + SPAN, total))
