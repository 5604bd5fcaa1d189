"""Counts the cost of every dispatched operator, and what autograd saves, on fake tensors."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from bench._roofline.ceilings import Ceilings
from fastgpt.kernels import _host
from fastgpt.kernels.costs import COSTS, KernelCost, attention_pairs

# Operators that allocate memory without writing to it.
_ALLOCATIONS = {
    f"aten::{name}"
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
}
_OVERWRITTEN = {"aten::copy_", "aten::fill_", "aten::zero_"}  # the first argument is not read

# Matrix products per score. PyTorch has no formula for these CPU kernels, and its formula for CUDA
# ignores the causal mask.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: 2,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: 5,
}


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Context with fake tensors: nothing is allocated or launched. The Triton ops accept CPU
    tensors as under ``TRITON_INTERPRET=1``, because fake CUDA tensors need CUDA."""
    with FakeTensorMode(), _host.interpreted():
        yield


@dataclass
class OpTotal:
    """Totals over all calls of one operator; milliseconds are at the ceilings."""

    calls: int = 0
    bytes: int = 0
    flops: int = 0
    ms: float = 0.0
    kernels_ms: dict[str, float] = field(default_factory=dict)  # of the kernels inside it


@dataclass(kw_only=True)
class Report(OpTotal):
    """One forward and backward: the totals, and their breakdown."""

    label: str
    ops: dict[str, OpTotal]  # the slowest first
    saved_bytes: int


def count(
    label: str,
    forward: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    ceilings: Ceilings,
) -> Report:
    """The cost of ``forward()``, which returns a scalar, and of its backward."""
    mode = CostMode(ceilings)
    saved = SavedActivations(parameters)
    with mode:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            loss = forward()
        saved_bytes = saved.nbytes()
        loss.backward()
    return Report(
        **vars(mode.total()),
        label=label,
        ops=dict(sorted(mode.ops.items(), key=lambda item: -item[1].ms)),
        saved_bytes=saved_bytes,
    )


class CostMode(TorchDispatchMode):
    """Mode that adds up the cost of dispatched operators by name."""

    def __init__(self, ceilings: Ceilings) -> None:
        super().__init__()
        self.ops: dict[str, OpTotal] = {}
        self._ceilings = ceilings

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        kernels = kernel_costs(func, args, kwargs, out)
        if kernels:
            half = any(t.is_floating_point() and t.itemsize == 2 for t in _tensors(args))
            total = self.ops.setdefault(_name(func), OpTotal())
            total.calls += 1
            for kernel in kernels:
                ms = self._ceilings.ms(kernel.flops, kernel.bytes, half, kernel.fp8)
                total.bytes += kernel.bytes
                total.flops += kernel.flops
                total.ms += ms
                total.kernels_ms[kernel.name] = total.kernels_ms.get(kernel.name, 0.0) + ms
        return out

    def total(self) -> OpTotal:
        """The totals over all operators."""
        total = OpTotal()
        for op in self.ops.values():
            total.calls += op.calls
            total.bytes += op.bytes
            total.flops += op.flops
            total.ms += op.ms
        return total


class SavedActivations:
    """Tracks the distinct storages that autograd saves for backward, without those of
    ``parameters``: ``torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)``."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {p.untyped_storage()._cdata for p in parameters}
        self._alive: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._alive[storage._cdata] = storage
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    def nbytes(self) -> int:
        return sum(storage.nbytes() for storage in self._alive.values())


def kernel_costs(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> list[KernelCost]:
    """The kernels of one call; empty for views, allocations and queries, which move nothing."""
    packet = func.overloadpacket
    if str(packet) in COSTS:
        return COSTS[str(packet)](out, *args, **kwargs)
    reads, writes = _moved(func, args, kwargs, out)
    if not writes:
        return []
    flops = 0
    if packet in _ATTENTION:
        flops = _attention_flops(_ATTENTION[packet], func, args, kwargs)
    elif packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
    return [KernelCost(_name(func), flops, _distinct(reads) + _distinct(writes))]


def _attention_flops(
    products: int, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    given = _named(func, args, kwargs)
    batch, n_head, n_queries, head_size = given["query"].shape
    pairs = attention_pairs(n_queries, given["key"].shape[2], given.get("is_causal", False))
    return products * 2 * batch * n_head * pairs * head_size


def _name(func: OpOverload) -> str:
    """The operator's name without the overload and the CPU suffix."""
    return func.name().partition(".")[0].replace("_for_cpu", "")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


def _moved(
    func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that are read, and those that are written."""
    name = _name(func)
    if name in _ALLOCATIONS:
        return [], []
    reads = _tensors((args, kwargs))
    known = {t.untyped_storage()._cdata for t in reads}
    if func._schema.is_mutable:
        known -= {t.untyped_storage()._cdata for t in _mutated(func, args, kwargs)}
    writes = [t for t in _tensors(out) if t.untyped_storage()._cdata not in known]
    if name in _OVERWRITTEN:
        reads = reads[1:]
    return reads, writes


def _mutated(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    given = _named(func, args, kwargs)
    return _tensors([given.get(a.name) for a in func._schema.arguments if a.is_write])


def _named(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def _distinct(tensors: list[Tensor]) -> int:
    """The bytes of the tensors; elements shared by views or repeated by expansion count once."""
    elements: dict[int, int] = {}
    whole: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        key = storage._cdata
        whole[key] = storage.nbytes()
        elements[key] = elements.get(key, 0) + tensor.numel() * tensor.itemsize
    return sum(min(elements[key], whole[key]) for key in whole)
