"""A line of a launch table: what else it could say, how that is put into its table, and the calls
whose time it decides.

Nothing is copied from the host functions: a candidate takes the line's place for the time of a
call, and the call is the one that the operators make.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# What a line says, as numbers; None for a product that is left to cuBLAS.
Tile = tuple[int, ...] | None
Sizes = Mapping[str, int]


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Call:
    """``run()`` launches the kernels and returns what they wrote, a new tensor or the same every
    time; ``reset()`` comes before it and is not timed. FLOPs and bytes as in ``_ceilings``."""

    run: Callable[[], Sequence[Tensor]]
    flops: int
    bytes: int
    reset: Callable[[], None] = _nothing


@dataclass(frozen=True)
class Line:
    """One line of a launch table."""

    name: str  # "attention fwd, head size 64"
    current: Tile
    candidates: tuple[Tile, ...]  # the current one not among them
    put: Callable[[Tile], AbstractContextManager[None]]  # within, the table says this
    call: Callable[[torch.device, torch.dtype, Sizes], Call]
    sizes: tuple[Sizes, ...]  # those that are timed, the most important first
    probe: Sizes  # small, with the specialisation of those: what is compiled ahead of time
    kernels: tuple[str, ...]  # that the line configures
    text: Callable[[Tile], str]  # as it stands in the source
    resident: bool = False  # the last number is how many programs fit on a multiprocessor


def candidates(current: Tile, *choices: Iterable[int | None]) -> tuple[Tile, ...]:
    return tuple(tile for tile in itertools.product(*choices) if tile != current)  # type: ignore


def around(value: int, least: int, most: int) -> list[int]:
    """Half, the same and twice."""
    return sorted({v for v in (value // 2, value, value * 2) if least <= v <= most})


def stage_counts(value: int) -> list[int]:
    return [n for n in (value - 1, value, value + 1) if n >= 1]


def in_dict(table: dict[Any, Any], key: Any) -> Callable[[Tile], AbstractContextManager[None]]:
    @contextmanager
    def put(tile: Tile) -> Iterator[None]:
        with mock.patch.dict(table, {key: tile}):
            yield

    return put


def in_module(
    module: Any, name: str, value_of: Callable[[tuple[int, ...]], Any]
) -> Callable[[Tile], AbstractContextManager[None]]:
    @contextmanager
    def put(tile: Tile) -> Iterator[None]:
        assert tile is not None
        with mock.patch.object(module, name, value_of(tile)):
            yield

    return put


def formatted(text: str) -> Callable[[Tile], str]:
    """A line that holds the numbers one by one."""
    return lambda tile: text.format(*(tile or ()))


def leaf(device: torch.device, dtype: torch.dtype, *shape: int, std: float = 1.0) -> Tensor:
    """Random, never zeros; it wants a gradient."""
    return torch.randn(shape, device=device).mul_(std).to(dtype).requires_grad_()


def gradients(outputs: Tensor | Sequence[Tensor], leaves: Sequence[Tensor]) -> Callable[[], Any]:
    """The backward of a graph that stays, with random gradients."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    grads = [torch.randn_like(out) for out in outputs]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def dict_line(
    module: Any, name_in_module: str, choices: Sequence[Iterable[int]], **fields: Any
) -> Line:
    """A launch that stands in its module as one dict."""
    launch: dict[str, int] = getattr(module, name_in_module)
    current = tuple(launch.values())

    def of(tile: tuple[int, ...]) -> dict[str, int]:
        return dict(zip(launch, tile, strict=True))

    def text(tile: Tile) -> str:
        assert tile is not None
        return f"{name_in_module} = dict({', '.join(f'{k}={v}' for k, v in of(tile).items())})"

    return Line(
        current=current,
        candidates=candidates(current, *choices),
        put=in_module(module, name_in_module, of),
        text=text,
        **fields,
    )
