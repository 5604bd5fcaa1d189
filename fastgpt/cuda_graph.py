"""A function that works on tensors of its own, replayed as one CUDA graph.

The host then launches once a call instead of once a kernel. What changes between two calls must lie
in tensors that the function finds at the same place each time; PyTorch's random generators count
on, so that every replay draws other numbers.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

_T = TypeVar("_T")

# Calls before the capture. They do what may not happen in one: kernels are compiled and loaded,
# libraries allocate what they keep.
_WARM_UP = 3


class Graphed(Generic[_T]):
    """``function()``, from the fourth call on as a CUDA graph.

    A replay writes its results to the same tensors: copy what must outlive the next call.
    """

    def __init__(self, function: Callable[[], _T], device: torch.device) -> None:
        self._function = function
        # Warm-up and capture share a stream of their own: a backward pass waits for the streams of
        # earlier ones, which a capture must not do.
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0
        self._result: _T

    def __call__(self) -> _T:
        if self._graph is None:
            current = torch.cuda.current_stream(self._stream.device)
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                if self._calls < _WARM_UP:
                    self._calls += 1
                    self._result = self._function()
                else:
                    self._graph = self._captured()
            current.wait_stream(self._stream)
        if self._graph is not None:
            self._graph.replay()
        return self._result

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Autocast would keep weights that it cast here, which are computed in a replay only.
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = self._function()
        finally:
            torch.set_autocast_cache_enabled(cache)
        return graph
