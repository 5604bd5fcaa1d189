"""Capture a function on static tensors as a CUDA graph and replay it.

The host then makes one launch per call instead of one per kernel. Inputs that change between calls
must be in tensors that keep their address. PyTorch's random generators advance with every replay,
so each draws new random numbers.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

_T = TypeVar("_T")

# Calls before the capture, for work that is not allowed during one: kernels are compiled and
# loaded, libraries allocate their workspaces.
_WARM_UP = 3


class Graphed(Generic[_T]):
    """Calls ``function()``, as a CUDA graph from the fourth call on.

    Every replay writes to the same result tensors: copy what must outlive the next call.
    """

    def __init__(self, function: Callable[[], _T], device: torch.device) -> None:
        self._function = function
        # Warm-up and capture use the same side stream: a backward pass waits for the streams of
        # earlier ones, which is not allowed during a capture.
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
        # Autocast would cache weights cast here, but these are only computed in a replay.
        cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._result = self._function()
        finally:
            torch.set_autocast_cache_enabled(cache)
        return graph
