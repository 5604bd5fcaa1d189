"""Checks a kernel's address arithmetic on tensors larger than memory: only their shapes exist, so
nothing is read or written.

    with checked_addresses():
        layer_norm_fwd(torch.empty(2**18, 16384, device="meta"), ...)

The interpreter runs the first and the last program of each launch. An access outside the launch's
tensors fails, and so does an int32 overflow. Loads return 1.0; from integer tensors they return
the argument's value in ``integers``, else 0.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import TensorHandle
from triton.runtime.jit import JITFunction

from tests.tools import interpreter
from tests.tools.interpreter import Builder, Observer, Program
from tests.tools.sanitizer import exchanged

_SPACING = 2**44  # bytes between the starts of two tensors


class _Virtual:
    """Stands in for a tensor in a launch: an address range without memory behind it."""

    def __init__(self, tensor: Tensor, number: int, integer: int) -> None:
        self.dtype = tensor.dtype
        self.start = number * _SPACING
        self.n_bytes = tensor.numel() * tensor.element_size()
        self.integer = integer

    def data_ptr(self) -> int:
        return self.start


class _Ends(Observer):
    def programs(self, tensors: list[Tensor], programs: list[Program]) -> list[Program]:
        return sorted({programs[0], programs[-1]})


class _AddressBuilder(Builder):
    launch: str
    virtual: dict[int, _Virtual]
    accesses: int

    def _checked(self, ptrs: TensorHandle, mask: TensorHandle) -> None:
        active = np.broadcast_to(np.asarray(mask.data), ptrs.data.shape)
        addresses = ptrs.data[active].astype(np.int64)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        for address in (addresses.min(initial=2**62), addresses.max(initial=0)):
            if addresses.size:
                tensor = self.virtual.get(int(address) // _SPACING)
                inside = tensor is not None and address - tensor.start + size <= tensor.n_bytes
                assert inside, f"{self.launch}: access out of bounds at {int(address):#x}"
        self.accesses += addresses.size

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *options: Any,
        **named_options: Any,
    ) -> TensorHandle:  # fmt: skip
        self._checked(ptrs, mask)
        element = ptrs.get_element_ty()
        dtype = triton_interpreter._get_np_dtype(element)
        if element.is_floating():
            ones = TensorHandle(np.ones(ptrs.data.shape, dtype=np.float32), tl.float32)
            return self.cast_impl(ones, element)
        tensor = self.virtual.get(int(np.max(ptrs.data)) // _SPACING)
        loaded = np.full(ptrs.data.shape, tensor.integer if tensor else 0, dtype=dtype)
        masked = 0 if other is None else other.data
        return TensorHandle(np.where(mask.data, loaded, masked).astype(dtype), element)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *options: Any
    ) -> None:
        self._checked(ptrs, mask)


@contextmanager
def checked_addresses(integers: Mapping[str, int] | None = None) -> Iterator[list[str]]:
    """Yields the names of the kernels that were launched."""
    builder = triton_interpreter.interpreter_builder
    launched: list[str] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        arguments = interpreter._bind(kernel, args, kwargs)
        for number, (name, value) in enumerate(arguments.items(), start=1):
            if isinstance(value, Tensor):
                arguments[name] = _Virtual(value, number, (integers or {}).get(name, 0))
        builder.launch, builder.accesses = kernel.__name__, 0
        builder.virtual = {
            v.start // _SPACING: v for v in arguments.values() if isinstance(v, _Virtual)
        }
        interpreter._interpret(kernel, grid, arguments)
        assert builder.accesses, f"{kernel.__name__}: the last program accessed nothing"
        launched.append(kernel.__name__)

    with exchanged(_AddressBuilder, _Ends()), torch.no_grad():
        with mock.patch.object(JITFunction, "run", run):
            yield launched
