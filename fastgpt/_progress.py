"""Console output of long work: progress bars on stderr and log lines, with or without rich."""

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console

AnyConsole: TypeAlias = "Console | PlainConsole"

SPAN = 1 << 22  # items at a time: a few milliseconds of work and at most 32 MB of int64
_SPANS_WITHOUT_BAR = 32  # about a second of work


def spans(total: int, description: str) -> Iterator[slice]:
    """Slices of at most ``SPAN`` items that cover ``range(total)`` in order. Shows a progress bar
    if there are many.
    """
    starts = range(0, total, SPAN)
    with progress_bar(description, hidden=len(starts) <= _SPANS_WITHOUT_BAR) as show:
        for start in starts:
            yield slice(start, min(start + SPAN, total))
            show(start / total)


@contextlib.contextmanager
def progress_bar(
    description: str, hidden: bool = False, console: "AnyConsole | None" = None
) -> Iterator[Callable[..., None]]:
    """A progress bar on ``console`` or stderr, updated by ``show(fraction, text="")``. The fraction
    done lies in [0, 1], or is None if the total is unknown. Shows nothing without rich, or if the
    console is not an interactive terminal.
    """
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column
    except ModuleNotFoundError:
        hidden = True
    else:
        console = console or Console(stderr=True)
    if hidden or not isinstance(console, Console) or not console.is_interactive:
        yield lambda fraction, text="": None
        return
    columns = (
        TextColumn(description),
        BarColumn(bar_width=12),
        TaskProgressColumn(),
        # Truncated on a narrow terminal.
        TextColumn("{task.fields[text]}", table_column=Column(ratio=1, no_wrap=True)),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as progress:
        task = progress.add_task("", total=None, text="")

        def show(fraction: float | None, text: str = "") -> None:
            total = None if fraction is None else 1.0
            progress.update(task, total=total, completed=fraction or 0.0, text=text)

        yield show


class PlainConsole:
    """The part of rich's Console that a run needs, for use without rich."""

    is_interactive = False

    def print(self, text: object, **style: Any) -> None:
        print(text, flush=True)


def escape_unprintable() -> None:
    """Make stdout and stderr print characters that their encoding lacks as escapes such as
    ``\\u2500`` instead of raising UnicodeEncodeError.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def run_console() -> AnyConsole:
    """A console on stdout without markup, so that file names and texts are printed unchanged, with
    ``escape_unprintable`` applied.
    """
    escape_unprintable()
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return PlainConsole()
    return Console(markup=False, highlight=False, soft_wrap=True)
