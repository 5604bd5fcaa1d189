"""Import of optional dependencies."""

import importlib
from pathlib import Path
from typing import Any

_CLONE = Path(__file__).parents[1]


def optional(module: str, what: str, extra: str) -> Any:
    """Import ``module`` for the feature ``what``. The ImportError says how to install it: in a
    clone by the project's ``extra``, otherwise by its own name, since no index has this project.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.removeprefix("torch.utils.").partition(".")[0]
        install = f"pip install {package}"
        if (_CLONE / "pyproject.toml").is_file():
            install = f'pip install -e ".[{extra}]" in {_CLONE}'
        raise ImportError(f"{what} needs {package}: {install}") from error
