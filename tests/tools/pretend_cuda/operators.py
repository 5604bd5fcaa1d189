"""Runs all operators of the device on the host: a fallback for PyTorch's dispatch key CUDA."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _pretend_cuda import (  # type: ignore[import-not-found]
    default_generator,
    host,
    is_capturing,
    is_pinned,
)
from torch import Tensor

from tests.tools.pretend_cuda import cuda_only, device
from tests.tools.pretend_cuda.graphs import Graph, Place, frozen, thawed
from tests.tools.trees import leaves, mapped

# Here the host waits for the device, to get the result's size or value.
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_INDEXING = {
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def fallback(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    name = op.name()
    device.catch_up()
    if name == "aten::record_stream":
        for block in device.blocks(args[:1]):
            device.order.record_stream(block, args[1].stream_id)
        return None
    kwargs = {key: x for key, x in kwargs.items() if key not in ("device", "pin_memory")}
    args = _numbers_as_tensors(op, args)
    packet = name.partition(".")[0]
    if packet in _WAITING or (packet in _INDEXING and _has_mask(args[1])):
        device.refuse_in_capture(name)
        device.host_waits_for_current_stream()

    written = _written(op, args, kwargs)
    every = _tensors((args, kwargs))
    of_others = {id(t) for t in written}
    device.work(name, [t for t in every if id(t) not in of_others], written)
    if Graph.capturing is not None:
        Graph.capturing.will_write(written)

    function = cuda_only.IMPLEMENTATIONS.get(name, op)
    seeded = torch.Tag.nondeterministic_seeded in op.tags and kwargs.get("generator") is None

    def call(args: Any, kwargs: Any) -> Any:
        with _device_generator() if seeded else torch.no_grad():
            return function(*args, **kwargs)

    on_host = mapped(lambda x: _checked(name, x) if isinstance(x, Tensor) else x, (args, kwargs))
    result = call(*on_host)
    returns = op._schema.returns
    if returns and all(r.alias_info is not None and r.alias_info.is_write for r in returns):
        out: Any = tuple(written[-len(returns) :]) if len(returns) > 1 else written[-1]
        pairs = zip(_tensors(out), _tensors(result), strict=True)
        made = [t for t, found in pairs if _resized(t, found)]
    else:
        out = mapped(lambda x: _brought(x, every) if isinstance(x, Tensor) else x, result)
        old = {id(t) for t in every}
        made = [t for t in _tensors(out) if id(t) not in old and not t._is_view()]
    device.work(name, [], made)
    if Graph.capturing is not None:
        again, places = frozen((args, kwargs)), [Place.of(t) for t in made]
        fresh = [i for i, t in enumerate(_tensors(out)) if any(t is m for m in made)]

        def replay() -> None:
            result = _tensors(call(*thawed(again)))
            for i, place in zip(fresh, places, strict=True):
                place.host().copy_(result[i])

        Graph.capturing.record(replay, [*every, *made])
    return out


@functools.cache
def _places_of_tensors(op: torch._ops.OpOverload) -> list[int]:
    """Positions of arguments at which a number must become a tensor."""
    if torch._C._should_allow_numbers_as_tensors(op._opname.rstrip("_")):
        return []
    return [i for i, a in enumerate(op._schema.arguments) if str(a.type) == "Tensor"]


def _numbers_as_tensors(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert Python numbers given for tensor arguments, which few operators accept here."""
    changed = list(args)
    for i in _places_of_tensors(op):
        if i < len(args) and isinstance(x := args[i], (bool, int, float)):
            changed[i] = torch.tensor(x, dtype=torch.float64 if isinstance(x, float) else None)
    return tuple(changed)


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


@functools.cache
def _written_arguments(op: torch._ops.OpOverload) -> list[tuple[int, str]]:
    return [
        (i, a.name)
        for i, a in enumerate(op._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]


def _written(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict) -> list[Tensor]:
    values = (args[i] if i < len(args) else kwargs.get(a) for i, a in _written_arguments(op))
    return _tensors(list(values))


def _checked(name: str, t: Tensor) -> Tensor:
    """The tensor for use on the host; a CPU tensor may only be a scalar or an index."""
    if device.on_device(t):
        # An empty tensor may be an output that the operator resizes.
        alias: Tensor = host(t) if t.numel() else t.new_empty(t.shape, device="cpu")
        return alias
    if t.dim() == 0:
        return t
    if name.partition(".")[0] not in _INDEXING:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"cuda:0 and {t.device}! ({name}, {tuple(t.shape)})"
        )
    return t


@contextmanager
def _device_generator() -> Iterator[None]:
    """Let the CPU generator draw the device's random numbers."""
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(default_generator().get_state())
    try:
        with torch.no_grad():
            yield
    finally:
        default_generator().set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)


def _resized(out: Tensor, result: Tensor) -> bool:
    """Whether the operator resized its output; if so, resize it on the device, too."""
    if not device.on_device(out) or out.shape == result.shape:
        return False
    out.resize_(result.shape)
    if not result.is_contiguous():
        out.as_strided_(result.shape, result.stride())
    host(out).copy_(result)
    return True


def _brought(result: Tensor, inputs: list[Tensor]) -> Tensor:
    """Bring a result to the device: as a view of an input, or as a copy."""
    address = result.untyped_storage().data_ptr()
    layout = (result.shape, result.stride(), result.storage_offset())
    for t in inputs:
        if address and device.on_device(t) and t.untyped_storage().data_ptr() == address:
            if (t.shape, t.stride(), t.storage_offset()) == layout and t.dtype == result.dtype:
                return t
            return torch.as_strided(t, *layout)
    out = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="cuda")
    host(out).copy_(result)
    return out


# -------------------------------------------------------------------------------------- copies


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    device.catch_up()
    to_device, from_device = device.on_device(target), device.on_device(source)
    on_host = None if to_device and from_device else (source if to_device else target)
    pinned = on_host is not None and is_pinned(on_host.data_ptr())
    if on_host is not None and is_capturing() and target.numel():
        if not pinned:
            device.refuse_in_capture(f"a copy with pageable memory {tuple(source.shape)}")
        if not non_blocking:
            device.refuse_in_capture("a copy that the host waits for")
    number = device.work("copy_", [source], [target])
    if Graph.capturing is not None:
        Graph.capturing.will_write([target])
    a, b = (host(t) if device.on_device(t) else t for t in (target, source))
    later = pinned and non_blocking and not is_capturing()
    with torch.no_grad():
        if later and from_device:
            device.copy_starts(number, target, b.clone(), to_host=True)
        else:
            a.copy_(b)
        if later and to_device:
            device.copy_starts(number, source, b.clone(), to_host=False)
    if on_host is not None and not is_capturing() and not (pinned and non_blocking):
        device.host_waits_for_current_stream()
    if Graph.capturing is not None:
        x, y = (Place.of(t) if device.on_device(t) else t for t in (target, source))
        Graph.capturing.record(_copying(x, y), [target, source])
    return target


def _copying(target: Any, source: Any) -> Callable[[], None]:
    def replay() -> None:
        thawed(target).copy_(thawed(source))

    return replay


def _item(t: Tensor) -> Any:
    device.catch_up()
    device.refuse_in_capture("aten::_local_scalar_dense")
    device.work("item", [t], [])
    device.host_waits_for_current_stream()
    return host(t).item()


def install() -> list[torch.library.Library]:
    """Register the operators for as long as the returned libraries live."""
    of_all, of_aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    of_all.fallback(fallback, "CUDA")
    of_aten.impl("copy_", _copy_, "CUDA")
    of_aten.impl("_local_scalar_dense", _item, "CUDA")
    for key in ("CUDA", "AutogradCUDA"):
        of_aten.impl("scaled_dot_product_attention", cuda_only.scaled_dot_product_attention, key)
    return [of_all, of_aten]
