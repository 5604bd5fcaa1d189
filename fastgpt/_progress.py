"""What long work shows: a bar over a long array, and the lines of a run."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

SPAN = 1 << 22  # items at a time: a few milliseconds of work and at most 32 MB of int64
_SPANS_WITHOUT_BAR = 32  # about a second of work


def spans(total: int, description: str) -> Iterator[slice]:
    """Slices of at most ``SPAN`` items that cover ``range(total)`` in order, with a bar on stderr
    where there are many.
    """
    starts = range(0, total, SPAN)
    shown = starts if len(starts) <= _SPANS_WITHOUT_BAR else _with_bar(starts, description)
    for start in shown:
        yield slice(start, min(start + SPAN, total))


def _with_bar(starts: range, description: str) -> Iterable[int]:
    try:
        from rich.console import Console
        from rich.progress import track
    except ModuleNotFoundError:
        return starts
    return track(starts, description, console=Console(stderr=True), transient=True)


class PlainConsole:
    """As much of rich's Console as a run needs, where rich is not installed."""

    is_terminal = False

    def print(self, text: object, **style: Any) -> None:
        print(text, flush=True)


def run_console() -> "Console | PlainConsole":
    """On stdout, without markup: names of files and texts are shown as they are."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return PlainConsole()
    return Console(markup=False, highlight=False, soft_wrap=True)
