"""Finds memory errors of interpreted kernels that a GPU would not report.

    with sanitize():
        layer_norm(x, weight)  # every launch on CPU tensors in here is checked

A finding raises ``SanitizerError`` with the program that caused it:

- an access outside the launch's tensors;
- a race: a program loads or stores what another program of the launch stores, or two lanes of a
  store write different values to one address. Programs run in a random order, because a GPU
  guarantees none;
- a load of what the same program has stored: another of its threads may not see it yet;
- int32 arithmetic that overflows, and a failing ``tl.device_assert``.

Masked lanes of a load without ``other`` are NaN or a large integer, so that a result that depends
on them shows.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.interpreter import TensorHandle

from tests.tools import interpreter
from tests.tools.interpreter import Builder, Observer, Program

_NOBODY, _SEVERAL = -1, -2


class SanitizerError(AssertionError):
    """A kernel's behaviour would be undefined or nondeterministic on a GPU."""


class _Memory(Observer):
    """The storages of the current launch, and which program accessed which address."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def programs(self, tensors: list[Tensor], programs: list[Program]) -> list[Program]:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        spans = sorted((start, size) for start, size in storages.items() if size)
        self._starts = np.array([start for start, _ in spans], dtype=np.uint64)
        self._sizes = np.array([size for _, size in spans], dtype=np.int64)
        # The shadow arrays have an entry for each byte; storage i begins at _shadow_starts[i].
        self._shadow_starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._writer = np.full(self._shadow_starts[-1], _NOBODY, dtype=np.int32)
        self._reader = np.full(self._shadow_starts[-1], _NOBODY, dtype=np.int32)
        return self._random.sample(programs, len(programs))

    def locate(self, addresses: np.ndarray, n_bytes: int, access: str) -> np.ndarray:
        """Addresses of elements of n_bytes each → indices into the shadow arrays."""
        storage = np.searchsorted(self._starts, addresses, side="right") - 1
        inside = storage >= 0
        if self._starts.size:
            offsets = (addresses - self._starts[storage]).astype(np.int64)
            inside &= offsets + n_bytes <= self._sizes[storage]
        if not inside.all():
            _fail(f"{access} out of bounds, {np.count_nonzero(~inside)} of {inside.size} lanes")
        return self._shadow_starts[storage] + offsets

    def load(self, places: np.ndarray) -> None:
        program, writer, reader = _current(), self._writer[places], self._reader[places]
        if (writer == program).any():
            _fail("load of what the same program stored in this launch")
        if (writer != _NOBODY).any():
            _fail("race: load of what another program stores in this launch")
        self._reader[places] = np.where(
            (reader == _NOBODY) | (reader == program), program, _SEVERAL
        )

    def store(self, places: np.ndarray, values: np.ndarray) -> None:
        program, writer, reader = _current(), self._writer[places], self._reader[places]
        if ((writer != _NOBODY) & (writer != program)).any():
            _fail("race: store to what another program stores in this launch")
        if ((reader != _NOBODY) & (reader != program)).any():
            _fail("race: store to what another program loads in this launch")
        order = np.argsort(places, kind="stable")
        places, bits = places[order], values[order].view(f"u{values.itemsize}")
        if ((places[1:] == places[:-1]) & (bits[1:] != bits[:-1])).any():
            _fail("race: two lanes of one store write different values to one address")
        self._writer[places] = program


class _CheckedBuilder(Builder):
    """Checks the two methods that every load and store of the interpreter goes through."""

    memory: _Memory

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *options: Any,
        **named_options: Any,
    ) -> TensorHandle:  # fmt: skip
        active = np.broadcast_to(np.asarray(mask.data), ptrs.data.shape)
        if active.any():
            self.memory.load(self.memory.locate(ptrs.data[active], _n_bytes(ptrs), "load"))
        if other is None:
            other = _poison(ptrs)
        return super().create_masked_load(ptrs, mask, other, *options, **named_options)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *options: Any
    ) -> None:
        active = np.broadcast_to(np.asarray(mask.data), ptrs.data.shape)
        if active.any():
            places = self.memory.locate(ptrs.data[active], _n_bytes(ptrs), "store")
            self.memory.store(places, np.broadcast_to(value.data, ptrs.data.shape)[active])
        return super().create_masked_store(ptrs, value, mask, *options)

    def create_assert(self, condition: TensorHandle, message: str) -> None:
        if not condition.data.all():
            _fail(message)


def _n_bytes(ptrs: TensorHandle) -> int:
    return max(1, ptrs.get_element_ty().primitive_bitwidth // 8)


def _poison(ptrs: TensorHandle) -> TensorHandle:
    element = ptrs.get_element_ty()
    dtype = triton_interpreter._get_np_dtype(element)
    value: float | int
    if element == tl.bfloat16:
        value = int(interpreter.narrow(np.array([np.nan]))[0])
    elif dtype.kind == "f":
        value = np.nan
    else:
        value = 1 if dtype.kind == "b" else np.iinfo(dtype).max // 3
    return TensorHandle(np.full(ptrs.data.shape, value, dtype=dtype), element)


def _current() -> int:
    """Linear index of the running program in the grid."""
    builder = triton_interpreter.interpreter_builder
    (x, y, z), (_, n_y, n_z) = builder.grid_idx, builder.grid_dim
    return (x * n_y + y) * n_z + z


def _fail(finding: str) -> None:
    raise SanitizerError(f"program {triton_interpreter.interpreter_builder.grid_idx}: {finding}")


@contextmanager
def exchanged(builder: type[Builder], observer: Observer, **attributes: Any) -> Iterator[None]:
    """Interpret launches with this builder and observer; int32 overflow raises."""
    interpreter.install()
    present = triton_interpreter.interpreter_builder
    outside = dict(vars(present)), present.__class__, interpreter.observer
    interpreter.observer, present.__class__ = observer, builder
    options = dataclasses.replace(present.options, debug=True)
    vars(present).update(attributes, options=options)
    try:
        yield
    finally:
        before, present.__class__, interpreter.observer = outside
        vars(present).clear()
        vars(present).update(before)


@contextmanager
def sanitize(seed: int = 0) -> Iterator[None]:
    """Check every interpreted launch in the block. ``seed`` sets the order of programs."""
    memory = _Memory(seed)
    with exchanged(_CheckedBuilder, memory, memory=memory):
        yield
