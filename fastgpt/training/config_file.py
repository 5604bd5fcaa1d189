"""Read nanoGPT's configuration files, which are Python, without executing them."""

import ast
import difflib
import time
import typing
from pathlib import Path
from typing import Any

from fastgpt.training.config import TrainConfig, check_key, typed
from fastgpt.training.presets import PRESETS


def keys_of(source: str | Path) -> dict[str, Any]:
    """The keys of a configuration file, or of the preset ``source`` if there is no such file.
    Errors: see ``read_config_file``.
    """
    if not Path(source).is_file() and str(source) in PRESETS:
        return PRESETS[str(source)]
    return read_config_file(source)


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The keys that a nanoGPT configuration file sets, read without executing anything.

    Such a file is Python: one plain assignment per line (``n_layer = 6``). A value is a number, a
    string, True or False, arithmetic on numbers (``5 * 8``) or a key that was set before. Strings
    may be joined by ``+`` and built with ``str(...)`` and, after ``import time``, ``time.time()``.
    Anything else raises a ValueError (TypeError for a value of the wrong type) naming file and
    line. Raises FileNotFoundError or IsADirectoryError if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"a configuration file is expected, but {path} is a folder")
    if not path.exists():
        near = difflib.get_close_matches(path.stem, PRESETS, n=1)
        hint = f"; there is a built-in one, {near[0]}: fastgpt train {near[0]}" if near else ""
        raise FileNotFoundError(f"there is no configuration file {path}{hint}")
    try:
        tree = ast.parse(path.read_text(encoding="utf-8-sig"), filename=str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at {error.start})") from None
    except SyntaxError as error:
        raise ValueError(f"{path}:{error.lineno}: not a Python assignment: {error.msg}") from None
    except ValueError as error:  # a NUL character, before Python 3.12
        raise ValueError(f"{path}: {error}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{path}: an expression has too many operators") from None
    values: dict[str, Any] = {}
    modules: set[str] = set()
    for statement in tree.body:
        match statement:
            case ast.Expr(value=ast.Constant()):  # a docstring
                continue
            case ast.Import(names=[ast.alias(name="time", asname=None)]):
                modules.add("time")
                continue
        try:
            key, value = _assignment(statement, values, modules)
            check_key(key)
            values[key] = typed(TrainConfig, key, value)
        except RecursionError:
            raise ValueError(
                f"{path}:{statement.lineno}: an expression has too many operators"
            ) from None
        except (ValueError, TypeError, ArithmeticError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{path}:{statement.lineno}: {error}") from None
    return values


_ALLOWED = (
    "allowed: key = a number, a string, True, False, arithmetic on numbers, an earlier key, "
    "strings joined by +, str(...), and after 'import time' time.time()"
)

_OPERATORS: dict[type[ast.operator], typing.Callable[[Any, Any], int | float]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}


def _assignment(statement: ast.stmt, values: dict[str, Any], modules: set[str]) -> tuple[str, Any]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=key)], value=expression):
            return key, _Evaluator(values, modules).value_of(expression)
    raise ValueError(f"{ast.unparse(statement).splitlines()[0]!r} is not read; {_ALLOWED}")


class _Evaluator:
    """Evaluates expressions, given the keys set and the modules imported on earlier lines."""

    def __init__(self, values: dict[str, Any], modules: set[str]) -> None:
        self._values, self._modules = values, modules

    def value_of(self, node: ast.expr) -> bool | int | float | str:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as constant):
                return constant
            case ast.Name(id=name) if name in self._values:
                return self._values[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -_number(operand, self.value_of(operand))
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return _number(operand, self.value_of(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                first, second = self.value_of(left), self.value_of(right)
                if type(op) is ast.Add and isinstance(first, str):
                    if not isinstance(second, str):
                        raise ValueError(f"{ast.unparse(right)!r} is not a string; {_ALLOWED}")
                    return first + second
                return _OPERATORS[type(op)](_number(left, first), _number(right, second))
            case ast.Call(func=ast.Name(id="str"), args=[argument], keywords=[]):
                return str(self.value_of(argument))
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="time"), attr="time"), args=[], keywords=[]
            ) if "time" in self._modules:
                return time.time()
        raise ValueError(f"{ast.unparse(node)!r} is not read; {_ALLOWED}")


def _number(node: ast.expr, value: bool | int | float | str) -> int | float:
    if isinstance(value, (bool, str)):
        raise ValueError(f"{ast.unparse(node)!r} is not a number; {_ALLOWED}")
    return value
