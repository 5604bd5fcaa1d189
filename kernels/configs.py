"""Which configuration a kernel is launched with: of the shipped table, or of the lines that were
measured on this GPU.

Of the lines of ``TABLE`` that fit a launch, ``lookup`` takes the first in this order; each rule
decides among those that the rules before it leave:

1. all options of the launch, then all but the last, and so on down to none;
2. its architecture class, then "gpu" (not in the interpreter), then ``ANY``;
3. its dtype class, then ``ANY``;
4. its size class, then ``ANY``;
5. its kernel, then ``ANY``.

On a GPU that ``fastgpt tune`` has measured, its own lines come before all of these: ``tuned``.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import _host, shipped_table, tuned_table

# The ops take the kinds of configurations from here.
from fastgpt.kernels.shipped_table import (  # noqa: F401
    ANY,
    CUBLAS,
    CUDNN,
    TABLE,
    Attention,
    AttentionDecode,
    AttentionDecodeSum,
    Elementwise,
    Gemm,
    Key,
    PartOfRow,
    Reduction,
    RowLoop,
    Tile,
    TileLoop,
    WholeRows,
)


@functools.cache
def architecture(capability: int | None) -> str:
    """The class of a compute capability (80, 90, ...); None: the interpreter."""
    if capability is None:
        return "interpreter"
    if capability < 80:
        return "sm_75"
    if 100 <= capability < 120:
        return "sm_100"
    return "sm_90" if capability == 90 else "sm_80"


@functools.cache
def dtype_class(dtype: torch.dtype) -> str:
    """As ``Key`` has it."""
    return "half" if _host.is_half(dtype) else str(dtype).removeprefix("torch.")


def first_line(
    table: Mapping[Key, Any],
    op: str,
    kernel: str,
    capability: int | None,
    dtype: torch.dtype,
    size: int | str = ANY,
    options: tuple[str, ...] = (),
) -> Any:
    """The line of a table for a launch, by the order that stands above.

    Raises:
        KeyError: there is no line for it.
    """
    own = architecture(capability)
    for chosen, arch, of_dtype, of_size, of_kernel in itertools.product(
        [options[:n] for n in range(len(options), -1, -1)],
        (own, ANY) if capability is None else (own, "gpu", ANY),
        (dtype_class(dtype), ANY),
        (size, ANY),
        (kernel, ANY),
    ):
        key = Key(op, of_kernel, arch, of_dtype, of_size, chosen)
        if key in table:
            return table[key]
    raise KeyError((op, kernel, capability, dtype, size, options))


@functools.cache
def lookup(
    op: str,
    kernel: str,
    capability: int | None,
    dtype: torch.dtype,
    size: int | str = ANY,
    options: tuple[str, ...] = (),
) -> Any:
    """The configuration of a launch in ``TABLE``. Raises KeyError as ``first_line``."""
    return first_line(TABLE, op, kernel, capability, dtype, size, options)


# Lines that were measured on a GPU, by its index, with the exact keys of its launches. None stands
# for the interpreter: it has lines only where a test, or the tuner, puts some there.
_TUNED: dict[int | None, dict[Key, Any]] = {None: {}}
_UNKNOWN = object()  # None is a configuration


def tuned(device: torch.device) -> dict[Key, Any]:
    """The lines that go before ``TABLE`` on the CPU or a GPU, which must have an index. What is
    written to them takes effect with the next launch. A GPU's are read from the file of
    ``fastgpt tune`` at its first launch."""
    index = device.index if device.type == "cuda" else None
    lines = _TUNED.get(index)
    return read_tuned(device) if lines is None else lines


def read_tuned(device: torch.device) -> dict[Key, Any]:
    """``tuned``, read again from the file. One that is damaged, or made elsewhere, is ignored with
    a warning."""
    with tuned_table.notice_of_damage(device):
        lines = tuned_table.read(device).get("lines", [])
        found = {decoded_key(line["key"]): decoded(line["config"]) for line in lines}
        return use_tuned(device, found)
    return use_tuned(device, {})


def use_tuned(device: torch.device, lines: dict[Key, Any]) -> dict[Key, Any]:
    """Let ``lines`` be ``tuned(device)``."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    _TUNED[index if device.type == "cuda" else None] = lines
    return lines


def encoded(config: Any) -> Any:
    """A configuration for a JSON file: a string or None as it is, a named tuple behind its class's
    name."""
    return [type(config).__name__, *config] if isinstance(config, tuple) else config


def decoded(value: Any) -> Any:
    """What ``encoded`` was given. Raises ValueError for anything else."""
    if value is None or isinstance(value, str):
        return value
    name, *values = value
    kind = getattr(shipped_table, name, None)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and kind is not Key):
        raise ValueError(f"{name!r} is no kind of configuration")
    return kind(*values)


def decoded_key(value: Any) -> Key:
    """A ``Key`` from the list that a JSON file has of it."""
    return Key._make([*value[:-1], tuple(value[-1])])


def find(x: Tensor, op: str, kernel: str, size: int | str = ANY, *options: str) -> Any:
    """The configuration of a launch whose main operand is ``x``."""
    capability = _host.capability(x.device)
    measured = tuned(x.device)
    if measured:
        # As a key it is equal to a Key, and it is cheaper to make.
        key = op, kernel, architecture(capability), dtype_class(x.dtype), size, options
        found = measured.get(key, _UNKNOWN)  # type: ignore[call-overload]
        if found is not _UNKNOWN:
            return found
    return lookup(op, kernel, capability, x.dtype, size, options)


@functools.lru_cache(maxsize=None, typed=True)  # typed: equal tuples of two kinds are not equal
def launch(config: Any) -> dict[str, Any]:
    """What a configuration gives the kernel. Not to be written to: later launches share it."""
    given = {k: v for k, v in config._asdict().items() if v is not None and k != "programs"}
    return given | _host.FMA
