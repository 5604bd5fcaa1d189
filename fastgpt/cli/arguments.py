"""Prepares the command line for tyro: normalizes booleans, and raises one-line errors for mistakes
that tyro would show in a box.
"""

import difflib
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from fastgpt.training.config import RENAMED_KEYS

_INSTEAD = {"resume": "init_from=resume"}  # a likely guess → the option that does it
_BOOLEANS = {"true": "True", "false": "False"}


def normalized(argv: list[str], commands: Mapping[str, type]) -> list[str]:
    """``argv`` with every boolean as ``--key=True`` or ``--key=False``, also if given as
    ``--key`` or ``--key VALUE``, or in another case. ``commands`` maps the name of each command to
    the dataclass of its keys, some of which may be in nested dataclasses.

    Raises ValueError for an unknown command or option, an option without dashes or value, and a
    value of the wrong type or not among the choices.
    """
    if not argv or argv[0].startswith("-"):
        return argv
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(commands)}"
        raise ValueError(f"unknown command {argv[0]!r}; {hint}")
    kinds = _kinds(commands[argv[0]])
    done, rest = argv[:1], argv[1:]
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        key = name.lstrip("-").replace("-", "_")
        if not argument.startswith("--"):
            if equals and key in kinds and not Path(argument).exists():
                dashed = f"--{argument.lstrip('-')}"
                raise ValueError(f"{argument} needs two dashes in front: {dashed}")
            done.append(argument)
            continue
        if key not in kinds and key not in ("", "help"):
            raise ValueError(f"unknown option --{key}{_advice(key, kinds)}")
        if kinds.get(key) is bool:
            if not equals:
                beside = bool(rest) and rest[0].lower() in _BOOLEANS
                value = rest.pop(0) if beside else "True"
            value = _BOOLEANS.get(value.lower(), value)
            argument = f"{name}={value}"
        done.append(argument)
        if key in kinds and kinds[key] is not bool and not equals:
            if not rest and typing.get_origin(kinds[key]) is not tuple:
                raise ValueError(f"--{key} needs a value")
            done += rest[:1]  # the value, even if it looks like an option
            value, rest = "".join(rest[:1]), rest[1:]
        _check_value(key, kinds.get(key), value)
    return done


def _kinds(command: type) -> dict[str, Any]:
    """The type of each option, by name."""
    found: dict[str, Any] = {}
    marked = typing.get_type_hints(command, include_extras=True)
    for name, kind in typing.get_type_hints(command).items():
        if is_dataclass(kind):
            found |= typing.get_type_hints(kind)
        elif tyro.conf.Positional not in getattr(marked[name], "__metadata__", ()):
            found[name] = kind
    return found


def _advice(key: str, kinds: Mapping[str, Any]) -> str:
    if key in RENAMED_KEYS:
        return f": it is called --{RENAMED_KEYS[key]} now"
    near = difflib.get_close_matches(key, kinds, n=1)
    if "init_from" in kinds and key in _INSTEAD:
        near = [_INSTEAD[key]]
    return f": did you mean --{near[0]}?" if near else "; --help shows the options"


def _check_value(key: str, kind: Any, value: str) -> None:
    parts = (kind, *typing.get_args(kind))  # kind, or kind | None
    choices = [c for part in parts if typing.get_origin(part) is Literal for c in part.__args__]
    if kind is bool and value not in _BOOLEANS.values():
        raise ValueError(f"{key} must be True or False, got {value!r}")
    if choices and value not in choices and value != "None":
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
    if Path in parts and not value:
        raise ValueError(f"{key} must be a path, got ''")
    for number, what in ((int, "an integer"), (float, "a number")):
        if kind is number or (kind == number | None and value != "None"):
            try:
                number(value)
            except ValueError:
                raise ValueError(f"{key} must be {what}, got {value!r}") from None
