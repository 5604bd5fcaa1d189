"""The reader of nanoGPT's configuration files, which are Python, without executing them."""

import ast
import typing
from pathlib import Path
from typing import Any

from fastgpt.training.config import TrainConfig, check_key, typed


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The keys that a nanoGPT configuration file sets, read without executing anything.

    Such a file is Python: one plain assignment per line (``n_layer = 6``). A value is a number, a
    string, True or False, arithmetic on numbers (``5 * 8``) or a key that was set before. Anything
    else is a ValueError (a value of the wrong type a TypeError) naming file and line;
    FileNotFoundError or IsADirectoryError if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"a configuration file is expected, but {path} is a folder")
    if not path.exists():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"), filename=str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at {error.start})") from None
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: not a Python assignment: {error.msg}") from None
    except ValueError as error:  # a NUL character, before Python 3.12
        raise ValueError(f"{path}: {error}") from None
    values: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        try:
            key, value = _assignment(statement, values)
            check_key(key)
            values[key] = typed(TrainConfig, key, value)
        except (ValueError, TypeError, ZeroDivisionError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{path}:{statement.lineno}: {error}") from None
    return values


_ALLOWED = "allowed: key = a number, a string, True, False, arithmetic on numbers or an earlier key"

_OPERATORS: dict[type[ast.operator], typing.Callable[[Any, Any], int | float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}


def _assignment(statement: ast.stmt, values: dict[str, Any]) -> tuple[str, Any]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=key)], value=expression):
            return key, _evaluate(expression, values)
    raise ValueError(f"{ast.unparse(statement).splitlines()[0]!r} is not read; {_ALLOWED}")


def _evaluate(node: ast.expr, values: dict[str, Any]) -> bool | int | float | str:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as constant):
            return constant
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, values)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _number(operand, values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_number(left, values), _number(right, values))
    raise ValueError(f"{ast.unparse(node)!r} is not read; {_ALLOWED}")


def _number(node: ast.expr, values: dict[str, Any]) -> int | float:
    value = _evaluate(node, values)
    if isinstance(value, (bool, str)):
        raise ValueError(f"{ast.unparse(node)!r} is not a number; {_ALLOWED}")
    return value
