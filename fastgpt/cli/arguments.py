"""The command line before tyro parses it: booleans in all their forms, and the mistakes for which
it has no advice.
"""

import difflib
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from fastgpt.training.config import RENAMED_KEYS

_INSTEAD = {"resume": "init_from=resume"}  # an option that there never was → what it means
_BOOLEANS = {"true": "True", "false": "False"}


def normalized(argv: list[str], commands: Mapping[str, type]) -> list[str]:
    """``argv`` with every boolean as ``--key=True`` or ``--key=False``, whether it was bare, its
    value beside it or behind ``=``, and in whatever case. ``commands`` maps the name of a command
    to the dataclass that has its keys, perhaps in dataclasses within it.

    Raises ValueError for an unknown command, an option that has another name, an option without
    dashes, and a text where a number is due.
    """
    if not argv or argv[0].startswith("-"):
        return argv
    if argv[0] not in commands:
        near = difflib.get_close_matches(argv[0], commands, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"allowed: {', '.join(commands)}"
        raise ValueError(f"unknown command {argv[0]!r}; {hint}")
    kinds = typing.get_type_hints(commands[argv[0]])
    for owner in filter(is_dataclass, [*kinds.values()]):
        kinds |= typing.get_type_hints(owner)
    done, rest = argv[:1], argv[1:]
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if not argument.startswith("--"):
            if equals and key in kinds and not Path(argument).exists():
                raise ValueError(f"{argument} needs two dashes in front: --{argument}")
            done.append(argument)
            continue
        if key not in kinds and key in RENAMED_KEYS:
            raise ValueError(f"unknown option --{key}: it is called --{RENAMED_KEYS[key]} now")
        if key not in kinds and "init_from" in kinds and key in _INSTEAD:
            raise ValueError(f"unknown option --{key}: did you mean --{_INSTEAD[key]}?")
        if kinds.get(key) is bool:
            if not equals:
                beside = bool(rest) and rest[0].lower() in _BOOLEANS
                value = rest.pop(0) if beside else "True"
            argument = f"{name}={_BOOLEANS.get(value.lower(), value)}"
        done.append(argument)
        if key in kinds and kinds[key] is not bool and not equals and rest:
            value = rest.pop(0)  # whatever it looks like
            done.append(value)
        elif not equals:
            continue
        _check_number(key, kinds.get(key), value)
    return done


def _check_number(key: str, kind: Any, value: str) -> None:
    for number, what in ((int, "an integer"), (float, "a number")):
        if kind is number or (kind == number | None and value != "None"):
            try:
                number(value)
            except ValueError:
                raise ValueError(f"{key} must be {what}, got {value!r}") from None
