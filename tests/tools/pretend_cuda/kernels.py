"""Triton launches on the device.

Filled: a kernel's outputs get values that are a function of all its inputs, so that a run which
reads one wrong value ends with other results. Outputs are recognised by their memory: it has not
been written yet or, if there is no such tensor, is all 0. Kernels that update other values in place
are interpreted, like every kernel with ``--interpret``; so are the optimizer's, since the number of
updates and whether one is skipped must be correct.
"""

import dataclasses
import zlib
from typing import Any

import torch
from _pretend_cuda import host, is_capturing  # type: ignore[import-not-found]
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.tools import interpreter
from tests.tools.pretend_cuda import device
from tests.tools.pretend_cuda.graphs import Graph, Place

_ALWAYS_INTERPRETED = {"_adamw_kernel", "_adamw_scalars_kernel"}


def _base(x: Any) -> Any:
    return x.base if isinstance(x, TensorDescriptor) else x


def _over(x: Any, base: Tensor) -> Any:
    return dataclasses.replace(x, base=base) if isinstance(x, TensorDescriptor) else base


def _specialised(kernel: JITFunction, named: dict[str, Any], options: dict[str, Any]) -> tuple:
    """Triton's specialisation key, as far as launches of this project can differ in it."""
    key: list[Any] = [kernel.fn, tuple(sorted(options.items()))]
    for param in kernel.params:
        value = named.get(param.name, param.default)
        base = _base(value)
        if param.is_constexpr:
            key.append(repr(value))
        elif isinstance(base, Tensor):
            key.append((type(value), base.dtype, base.data_ptr() % 16 == 0))
        elif type(value) is int:
            key.append((value == 1, value % 16 == 0, -(2**31) <= value < 2**31))
        else:
            key.append(type(value))
    return tuple(key)


def _unwritten(t: Tensor) -> Tensor:
    """Mask of elements not written since allocation; integer tensors count as a whole."""
    if t.dtype.is_floating_point:
        return t.float().isnan()
    return (t == (255 if t.dtype == torch.uint8 else -1)).all().expand(t.shape)


def _outputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name → mask of elements that the kernel writes; empty if unknown."""
    masks = {name: _unwritten(t) for name, t in tensors.items()}
    found = {name: mask for name, mask in masks.items() if mask.any()}
    return found or {
        name: torch.ones_like(masks[name])
        for name, t in tensors.items()
        if t.dtype.is_floating_point and not t.float().any()
    }


def _digest(kernel: JITFunction, tensors: list[Tensor], others: list[Any]) -> int:
    found = zlib.crc32(repr((kernel.fn.__name__, others)).encode())
    for t in tensors:
        found = zlib.crc32(t.contiguous().flatten().view(torch.uint8).numpy().tobytes(), found)
    return found


def _fill(t: Tensor, mask: Tensor, digest: int) -> None:
    """Fill masked elements with values within ± 0.02, integers with 0."""
    if not t.dtype.is_floating_point:
        t.masked_fill_(mask, 0)
        return
    scattered = (torch.arange(t.numel()) * 40503 + digest) % 65521
    numbers = (scattered.float() / 65521 - 0.5) * 0.04
    t.copy_(torch.where(mask, numbers.view(t.shape), t.float()))


class _Launches:
    def __init__(self, run: Any, interpret: bool) -> None:
        self._run = run  # the interpreter's
        self._interpret = interpret
        self._compiled: set[tuple] = set()

    def __call__(self, kernel: JITFunction, args: tuple, grid: Any, options: dict) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        launch_options = {k: v for k, v in given.items() if k not in kernel.arg_names}
        named = {k: v for k, v in given.items() if k in kernel.arg_names}
        tensors = [t for x in named.values() if isinstance(t := _base(x), Tensor)]
        if not all(device.on_device(t) for t in tensors):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        device.catch_up()
        key = _specialised(kernel, named, launch_options)
        if is_capturing() and key not in self._compiled:
            device.report(f"{kernel.fn.__name__} is compiled in a capture")
        self._compiled.add(key)
        device.work(kernel.fn.__name__, [], tensors)
        if Graph.capturing is not None:
            Graph.capturing.will_write(tensors)

        given_tensors = {k: x for k, x in named.items() if isinstance(_base(x), Tensor)}
        places = {k: Place.of(_base(x)) for k, x in given_tensors.items()}
        hosts = {k: host(_base(x)) for k, x in given_tensors.items()}
        masks: dict[str, Tensor] = {}
        if not self._interpret and kernel.fn.__name__ not in _ALWAYS_INTERPRETED:
            masks = _outputs(hosts)
        others = [x for k, x in given.items() if k not in places]

        def launch(hosts: dict[str, Tensor]) -> None:
            if not masks:
                over = given | {k: _over(x, hosts[k]) for k, x in given_tensors.items()}
                positional = [over.pop(name) for name in kernel.arg_names[: len(args)]]
                self._run(kernel, *positional, grid=grid, warmup=False, **over)
                return
            read = [t for name, t in hosts.items() if name not in masks]
            digest = _digest(kernel, read, others)
            for name, mask in masks.items():
                _fill(hosts[name], mask, digest)

        launch(hosts)
        if Graph.capturing is not None:
            Graph.capturing.record(
                lambda: launch({k: place.host() for k, place in places.items()}), tensors
            )


def install(interpret: bool) -> None:
    interpreter.install()
    launches = _Launches(JITFunction.run, interpret)
    run_on_cpu = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if warmup or not any(device.on_device(_base(x)) for x in (*args, *options.values())):
            return run_on_cpu(self, *args, grid=grid, warmup=warmup, **options)
        return launches(self, args, grid, options)

    JITFunction.run = run
