"""Helpers shared by the command lines: options, errors, tables, output files."""

import argparse
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from rich import box
from rich.console import Console
from rich.table import Table

T = TypeVar("T")

_SIZES, _SEEDS = (1, 2**24), (0, 2**63)  # the second limit is exclusive

# Errors that a user can cause: one line on stderr and the exit code 2.
USER_ERRORS = ValueError, OSError, ModuleNotFoundError


def options(default: T, argv: Sequence[str] | None) -> T:
    """``default`` with fields replaced by command-line options, --like_this=1 or --like-this 1. The
    comment above a field is its help text. Raises the errors of ``default``'s class, and ValueError
    for a float that is not positive and finite or an integer out of range."""
    owner = type(default)
    parser = Parser(description=owner.__doc__, allow_abbrev=False)
    helps = _comments(owner)
    for name, kind in get_type_hints(owner).items():
        many = get_origin(kind) is tuple
        one = get_args(kind)[0] if many or isinstance(kind, UnionType) else kind  # X of X | None
        choices = get_args(one) if get_origin(one) is Literal else None
        value = getattr(default, name)
        shown = " ".join(map(str, value)) if many else value
        ending = "" if value in (None, ()) else f" (default: {shown})".replace("%", "%%")
        parser.add_argument(
            f"--{name}",
            type=_boolean if one is bool else type(choices[0]) if choices else one,
            choices=choices,
            nargs="*" if many else None,
            metavar="{True,False}" if one is bool else None if choices else name.upper(),
            default=value,
            help=helps[name] + ending,
        )
    words = sys.argv[1:] if argv is None else argv
    given = vars(parser.parse_args([_underscored(word) for word in words]))
    for name, value in given.items():
        for number in value if isinstance(value, list) else [value]:
            _check_number(name, number)
    return owner(**{key: tuple(v) if isinstance(v, list) else v for key, v in given.items()})


def _check_number(name: str, value: Any) -> None:
    least, end = _SEEDS if name == "seed" else _SIZES
    if type(value) is int and not least <= value < end:
        allowed = f"at least {least}" if value < least else f"below {end}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    if type(value) is float and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(failed(f"{message}; --help shows the options"))


def _underscored(word: str) -> str:
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}" if word.startswith("--") else word


def _boolean(text: str) -> bool:
    if text.capitalize() not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return text.capitalize() == "True"


def _comments(owner: type) -> dict[str, str]:
    """The comment above each field of a class."""
    found, comment = {}, list[str]()
    for line in map(str.strip, inspect.getsource(owner).splitlines()):
        if line.startswith("# "):
            comment.append(line[2:].replace("%", "%%"))
        else:
            found[line.partition(":")[0]] = " ".join(comment)
            comment = []
    return found


def failed(error: object) -> int:
    """Print the error and return the exit code. An OSError is printed as cause and path."""
    if isinstance(error, OSError) and error.strerror is not None:
        error = f"{error.strerror}: {error.filename}"
    Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(
        f"error: {error}", style="bold red"
    )
    return 2


def exit_of(main: Callable[[list[str] | None], object], argv: list[str] | None = None) -> int:
    """Run ``main`` and return its exit code: 0; 2 after printing a user's error; 130 for Ctrl-C."""
    try:
        main(argv)
    except USER_ERRORS as error:
        return failed(error)
    except KeyboardInterrupt:
        failed("interrupted")
        return 130
    return 0


def failure_of(error: Exception) -> str:
    """The error in one line."""
    if type(error).__name__ == "OutOfMemoryError":  # by name: PyTorch is not imported here
        return "out of memory"
    lines = str(error).strip().splitlines()
    if isinstance(error, FloatingPointError):
        return lines[0]
    return ": ".join([type(error).__name__, *lines[:1]])


def plain_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """A compact table with the left-aligned columns first."""
    out = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for header in left:
        out.add_column(header, no_wrap=True)
    for header in right:
        out.add_column(header, justify="right", no_wrap=True)
    return out


def made_folder(folder: Path, rule: str = "out must be a folder") -> Path:
    """Create ``folder``. Raises NotADirectoryError if it or one of its parents is a file."""
    from fastgpt._files import check_folder  # late: a program's --help needs no PyTorch

    check_folder(folder, rule)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def results_folder(out: Path, name: str) -> Path:
    """Create ``out`` for name.json and name.png, before anything is computed.

    Raises ModuleNotFoundError without matplotlib, FileExistsError if either file exists,
    NotADirectoryError if ``out`` or one of its parents is a file."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError('the chart needs matplotlib: pip install -e ".[bench]"')
    for path in _results(out, name):
        if path.exists():
            raise FileExistsError(f"out must be a folder without results, but {path} exists")
    return made_folder(out)


def write_results(
    out: Path,
    name: str,
    run: dict[str, Any],
    chart: Callable[[dict[str, Any], Path], object],
    console: Console,
) -> None:
    """Write name.json, and name.png with ``chart(run, path)``."""
    numbers, picture = _results(out, name)
    write_json(numbers, run)
    chart(run, picture)
    console.print(f"wrote {numbers} and {picture}", soft_wrap=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: if the program is killed, the old file remains."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def _results(out: Path, name: str) -> tuple[Path, Path]:
    return out / f"{name}.json", out / f"{name}.png"
