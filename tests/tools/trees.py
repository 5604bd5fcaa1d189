"""Nested arguments and results of operators: like ``torch.utils._pytree`` for tuples, lists and
dicts only, in a fifth of the time.
"""

from collections.abc import Callable
from typing import Any


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, tuple):
        return tuple([mapped(function, x) for x in tree])
    if isinstance(tree, list):
        return [mapped(function, x) for x in tree]
    if isinstance(tree, dict):
        return {key: mapped(function, x) for key, x in tree.items()}
    return function(tree)


def leaves(tree: Any) -> list[Any]:
    found: list[Any] = []
    mapped(found.append, tree)
    return found
