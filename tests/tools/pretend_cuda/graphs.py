"""CUDA graphs: captured calls are executed, undone, and repeated by address in each replay."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from _pretend_cuda import (  # type: ignore[import-not-found]
    at_address,
    current_stream,
    default_generator,
    is_capturing,
    set_capturing,
)
from torch import Tensor

from tests.tools.pretend_cuda import device
from tests.tools.pretend_cuda.device import Block
from tests.tools.trees import mapped


@dataclass(frozen=True)
class Place:
    """A device tensor as stored in a graph: address and layout."""

    block: Block | None  # None if it has no bytes
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @staticmethod
    def of(t: Tensor) -> "Place":
        found = device.blocks([t])
        return Place(
            found[0] if found else None,
            t.dtype,
            tuple(t.shape),
            tuple(t.stride()),
            int(t.storage_offset()),
        )

    def host(self) -> Tensor:
        """A CPU tensor on that memory."""
        if self.block is None:
            return torch.empty(self.sizes, dtype=self.dtype)
        if device.block_at(self.block.address) != self.block:
            raise RuntimeError(
                f"a CUDA graph uses memory that was freed after its capture: {self.dtype} "
                f"{self.sizes}"
            )
        layout = (self.dtype, list(self.sizes), list(self.strides), self.offset)
        return at_address(self.block.address, self.block.n_bytes, *layout)


def frozen(tree: Any) -> Any:
    """Arguments as stored in a graph: device tensors by place, host tensors by value."""

    def freeze(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return Place.of(x) if device.on_device(x) else x.clone()

    return mapped(freeze, tree)


def thawed(tree: Any) -> Any:
    """Turn places into CPU tensors on the device's memory."""
    return mapped(lambda x: x.host() if isinstance(x, Place) else x, tree)


class Graph:
    """``torch._C._CUDAGraph``"""

    capturing: "Graph | None" = None

    def __new__(cls, keep_graph: bool = False) -> "Graph":
        return super().__new__(cls)

    def __init__(self, keep_graph: bool = False) -> None:
        self._calls: list[Callable[[], None]] | None = None
        self._blocks: set[Block] = set()  # used by the calls
        self._before: dict[Block, Tensor] = {}  # contents when the capture began

    def capture_begin(self, *pool: Any, capture_error_mode: str = "global", **_: Any) -> None:
        if current_stream() == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if is_capturing():
            raise RuntimeError("a capture is in progress")
        device.catch_up()
        self._calls = []
        self._generator = default_generator().get_state()
        device.CaptureEvents.stream = current_stream()
        device.CaptureEvents.inside = set()
        Graph.capturing = self
        set_capturing(True)

    def capture_end(self) -> None:
        device.catch_up()
        set_capturing(False)
        Graph.capturing = None
        default_generator().set_state(self._generator)
        for block, before in self._before.items():
            if device.block_at(block.address) == block:
                _bytes(block).copy_(before)
        self._before.clear()
        for block in self._blocks:
            if block.of_graph:
                _bytes(block).fill_(0xFF)
        if not self._calls:
            device.report("the captured CUDA graph is empty")

    def will_write(self, tensors: Iterable[Tensor]) -> None:
        """Save the tensors' memory, so that the end of the capture can restore it."""
        for block in device.blocks(tensors):
            if not block.of_graph and block not in self._before:
                self._before[block] = _bytes(block).clone()

    def record(self, call: Callable[[], None], tensors: Iterable[Tensor]) -> None:
        """``call`` repeats what was just done with ``tensors``."""
        assert self._calls is not None
        self._calls.append(call)
        self._blocks.update(device.blocks(tensors))

    def replay(self) -> None:
        if self._calls is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        device.refuse_in_capture("cudaGraphLaunch")
        device.catch_up()
        device.order.work("the graph", current_stream(), [], self._blocks)
        for call in self._calls:
            call()

    def reset(self) -> None:
        self._calls = None

    def instantiate(self) -> None:
        pass

    def pool(self) -> tuple[int, int]:
        return 0, id(self)

    def register_generator_state(self, generator: torch.Generator) -> None:
        pass


def _bytes(block: Block) -> Tensor:
    return at_address(block.address, block.n_bytes, torch.uint8, [block.n_bytes], [1], 0)
