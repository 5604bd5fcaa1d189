"""Tensors and options for an op, drawn by hypothesis."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tests.tools.parity import DTYPES, LAYOUTS, randn

with suppress(ImportError):  # in the extra "test"; needed only for drawing
    import hypothesis
    from hypothesis import strategies as st

Drawn = tuple[Callable[..., Tensor], Sequence[Tensor]]  # call(ops, *tensors), and the tensors


class Draws:
    """Draws one case, in one dtype. ``drops``: some cases have dropout."""

    def __init__(self, draw: Callable[[Any], Any], drops: bool = False) -> None:
        self._draw, self._drops = draw, drops
        self.dtype = self.one_of(*DTYPES)
        torch.manual_seed(draw(st.integers(0, 1 << 30)))

    def one_of(self, *values: Any) -> Any:
        return self._draw(st.sampled_from(values))

    def size(self, most: int) -> int:
        size: int = self._draw(st.integers(1, most))
        return size

    def width(self, most: int) -> int:
        """Width of a LayerNorm. A few elements may be nearly equal, and division by their standard
        deviation would amplify any rounding, PyTorch's and ours."""
        return 7 + self.size(most)

    def flag(self) -> bool:
        flag: bool = self._draw(st.booleans())
        return flag

    def tensor(self, *shape: int) -> Tensor:
        return randn(shape, self.dtype, "cpu", self.one_of(*LAYOUTS))

    def gradient(self, shape: Sequence[int]) -> Tensor:
        return self.tensor(*shape) if len(shape) else self.tensor(1)[0]

    def maybe(self, *shape: int) -> list[Tensor]:
        return [self.tensor(*shape)] if self.flag() else []

    def outer(self) -> list[int]:
        """Leading dimensions, possibly none."""
        sizes: list[int] = self._draw(st.lists(st.integers(0, 5), max_size=3))
        return sizes

    def integers(self, high: int, *shape: int) -> Tensor:
        dtype = self.one_of(torch.int64, torch.int32)
        return torch.randint(high, shape, dtype=dtype)

    def dropout(self) -> dict[str, Any]:
        if not (self._drops and self.flag()):
            return {}
        return dict(
            dropout_p=self.one_of(0.1, 0.5, 0.9),
            seed=torch.randint(1 << 62, (1,)),
            dropout_offset=self._draw(st.integers(0, 9)),
        )

    def assume(self, fits: bool) -> None:
        """Draw another case unless this one fits."""
        hypothesis.assume(fits)

    def doc_start(self, batch: int, length: int) -> Tensor:
        begins = torch.rand(batch, length) < 0.2
        places = torch.arange(length).expand(batch, -1)
        return torch.where(begins, places, 0).cummax(1).values.int()
