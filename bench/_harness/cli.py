"""What the command lines of this folder share: options, errors, and the files they write."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table

T = TypeVar("T")

# What a user can cause: each is one line on stderr and the exit code 2.
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    PermissionError,
    ModuleNotFoundError,
)


def options(default: T, argv: list[str] | None) -> T:
    """The dataclass as the command line fills it, --like_this; the rest is as in ``default``.

    Raises ModuleNotFoundError as ``tyro``."""
    found = tyro()
    return found.cli(
        type(default),
        default=default,
        args=argv,
        use_underscores=True,
        config=(found.conf.FlagConversionOff,),
    )


def tyro() -> Any:
    """The reader of command lines, which nothing else here needs.

    Raises ModuleNotFoundError where it is not installed, saying how to install it."""
    try:
        import tyro
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the command line needs tyro: pip install tyro") from error
    return tyro


def failed(error: object) -> int:
    """Say so; the exit code."""
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(
        f"error: {error}", style="bold red"
    )
    return 2


def failure_of(error: Exception) -> str:
    """What went wrong, in one line, of something that ends alone while the rest goes on."""
    if type(error).__name__ == "OutOfMemoryError":  # PyTorch's, which need not be loaded here
        return "out of memory"
    lines = str(error).strip().splitlines()
    if isinstance(error, FloatingPointError):
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def plain_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Without lines between columns, so that much fits into 80; titles of columns on both sides."""
    out = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for header in left:
        out.add_column(header, no_wrap=True)
    for header in right:
        out.add_column(header, justify="right", no_wrap=True)
    return out


def results_folder(out: Path, name: str) -> Path:
    """``out``, made where it is not there, for name.json and name.png; before anything is computed.

    Raises ModuleNotFoundError without matplotlib, FileExistsError where such results are."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError('the chart needs matplotlib: pip install -e ".[bench]"')
    for path in _results(out, name):
        if path.exists():
            raise FileExistsError(f"out must be a folder without results, but {path} exists")
    out.mkdir(parents=True, exist_ok=True)
    return out


def write_results(
    out: Path,
    name: str,
    run: dict[str, Any],
    chart: Callable[[dict[str, Any], Path], object],
    console: Console,
) -> None:
    """name.json, and name.png as ``chart(run, path)`` draws it."""
    numbers, picture = _results(out, name)
    write_json(numbers, run)
    chart(run, picture)
    console.print(f"wrote {numbers} and {picture}", soft_wrap=True)


def write_json(path: Path, value: Any) -> None:
    """All of it or nothing: a program that is cut off leaves the old file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _results(out: Path, name: str) -> tuple[Path, Path]:
    return out / f"{name}.json", out / f"{name}.png"
