"""The functions that a CUDA build adds to ``torch._C``, used by ``torch.cuda``."""

import importlib
import time
from types import SimpleNamespace
from typing import Any

import _pretend_cuda as C  # type: ignore[import-not-found]
import torch

from tests.tools.pretend_cuda import device
from tests.tools.pretend_cuda.graphs import Graph

_CUDA = 1  # number of the device type
_MEMORY_BYTES = 80 << 30


class _Stream(torch._C.Stream):
    def __new__(cls, priority: int = 0, stream_id: int | None = None, **_: Any) -> "_Stream":
        number = C.new_stream() if stream_id is None else stream_id
        return super().__new__(cls, stream_id=number, device_index=0, device_type=_CUDA)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def query(self) -> bool:
        device.refuse_in_capture("cudaStreamQuery")
        self._wait()
        return True

    def synchronize(self) -> None:
        device.refuse_in_capture("cudaStreamSynchronize")
        self._wait()

    def _wait(self) -> None:
        C.tell("synchronize stream", 0, self.stream_id)
        device.catch_up()


class _Event:
    def __new__(cls, enable_timing: bool = False, **_: Any) -> "_Event":
        self = super().__new__(cls)
        self._id, self._timed, self._time = C.new_event(), enable_timing, None
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        self._id: int
        self._timed: bool
        self._time: float | None

    def record(self, stream: _Stream) -> None:
        C.tell("record", self._id, stream.stream_id)
        self._time = time.perf_counter()

    def wait(self, stream: _Stream) -> None:
        if self._time is not None:  # an event not recorded yet does not block
            C.tell("wait", self._id, stream.stream_id)

    def query(self) -> bool:
        device.refuse_in_capture("cudaEventQuery")
        self._wait()
        return True

    def synchronize(self) -> None:
        device.refuse_in_capture("cudaEventSynchronize")
        self._wait()

    def _wait(self) -> None:
        C.tell("synchronize event", self._id, 0)
        device.catch_up()

    def elapsed_time(self, end: "_Event") -> float:
        """Host time in milliseconds, at least a microsecond."""
        if not (self._timed and end._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._time is None or end._time is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return max(1e-3, 1e3 * (end._time - self._time))


class _Properties:
    name = "pretended device"
    major, minor = divmod(device.CAPABILITY, 10)
    total_memory = _MEMORY_BYTES
    multi_processor_count = 2  # few, since programs of a persistent kernel run sequentially
    max_threads_per_multi_processor = 2048
    warp_size = 32
    L2_cache_size = 50 << 20
    shared_memory_per_block_optin = 232448
    uuid = "00000000-0000-0000-0000-000000000000"


def _synchronize() -> None:
    device.refuse_in_capture("cudaDeviceSynchronize")
    C.tell("synchronize", 0, 0)
    device.catch_up()


def _exchange_device(index: int) -> int:
    before = int(C.current_device())
    if index >= 0:
        C.set_device(index)
    return before


def _maybe_exchange_device(index: int) -> int:
    """A separate function, because torch.compile distinguishes the two."""
    return _exchange_device(index)


def _memory_stats(index: int) -> dict[str, Any]:
    live, peak = C.memory()
    pools = {"all": {"current": live, "peak": peak, "allocated": live, "freed": 0}}
    names = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
    return {name: pools for name in names}


def _new_storage(cls: type, *args: Any, device: Any = None, **options: Any) -> Any:
    """A build without CUDA cannot create CUDA storage of a given size."""
    if device is None or torch.device(device).type != "cuda":
        new: Any = torch._C.StorageBase.__new__
        return new(cls, *args, device=device, **options)
    return torch.empty(args, dtype=torch.uint8, device=device).untyped_storage()


def _init() -> None:
    cuda: Any = torch.cuda
    cuda.default_generators = (C.default_generator(),)
    cuda._get_device_properties = lambda index: _Properties()


_NAMES: dict[str, Any] = {
    "_has_cuda": True,
    "_CudaStreamBase": _Stream,
    "_CudaEventBase": _Event,
    "_CUDAGraph": Graph,
    "_CudaDeviceProperties": _Properties,
    "_graph_pool_handle": lambda: (0, 1),
    "_cuda_isCurrentStreamCapturing": C.is_capturing,
    "_cuda_init": _init,
    "_cuda_getDeviceCount": lambda: 1,
    "_cuda_getDevice": C.current_device,
    "_cuda_setDevice": C.set_device,
    "_cuda_exchangeDevice": _exchange_device,
    "_cuda_maybeExchangeDevice": _maybe_exchange_device,
    "_cuda_getCurrentStream": lambda index: (C.current_stream(), 0, _CUDA),
    "_cuda_getDefaultStream": lambda index: (0, 0, _CUDA),
    "_cuda_setStream": lambda stream_id, device_index, device_type: C.set_stream(stream_id),
    "_cuda_getCurrentRawStream": lambda index: C.current_stream(),
    "_cuda_synchronize": _synchronize,
    "_cuda_emptyCache": lambda: device.refuse_in_capture("cudaFree"),
    "_host_emptyCache": lambda: device.refuse_in_capture("cudaFreeHost"),
    "_cuda_memoryStats": _memory_stats,
    "_cuda_resetPeakMemoryStats": lambda index: C.reset_peak(),
    "_cuda_isInBadFork": lambda: False,
    "_cuda_getArchFlags": lambda: f"sm_{device.CAPABILITY}",
    "_cuda_set_sync_debug_mode": device.Waiting.set_mode,
    "_cuda_get_sync_debug_mode": lambda: device.Waiting.mode,
    "_cuda_CUDAAllocator_AllocatorState": object,  # both imported by torch.compiler.reset()
    "_set_cached_tensors_enabled": lambda enabled: None,
}


def install() -> None:
    for name, value in _NAMES.items():
        setattr(torch._C, name, value)
    streams = importlib.reload(torch.cuda.streams)  # to derive their classes from these
    graphs = importlib.reload(torch.cuda.graphs)
    for name in ("Stream", "Event", "ExternalStream"):
        setattr(torch.cuda, name, getattr(streams, name))
    for name in graphs.__all__:
        setattr(torch.cuda, name, getattr(graphs, name))
    cuda: Any = torch.cuda
    cuda._exchange_device, cuda._maybe_exchange_device = _exchange_device, _maybe_exchange_device
    cuda._CudaDeviceProperties = _Properties
    cuda._cudart = SimpleNamespace(cudaMemGetInfo=lambda index: (_MEMORY_BYTES, _MEMORY_BYTES))
    cuda._is_in_bad_fork = lambda: False
    cuda._device_count_nvml = lambda: 1
    torch.version.cuda = "13.0"
    torch.UntypedStorage.__new__ = _new_storage  # type: ignore[assignment]
