"""Packages that only some commands need."""

import importlib
from typing import Any


def optional(module: str, what: str, extra: str) -> Any:
    """Import ``module``, which ``what`` needs; an ImportError names the extra that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f'{what} needs {package}: pip install "fastgpt-triton[{extra}]"'
        ) from error
