"""Launch configurations: looked up in the shipped table, or among the entries measured on this GPU.

``lookup`` returns the best match in ``TABLE`` for a launch. Entries are preferred by these rules,
the first rule counting most:

1. all options of the launch, then all but the last, and so on down to none;
2. its architecture class, then "gpu" (not in the interpreter), then ``ANY``;
3. its dtype class, then ``ANY``;
4. its size class, then ``ANY``;
5. its kernel, then ``ANY``.

On a GPU measured by ``fastgpt tune``, its own entries (``tuned``) take precedence over the table.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import _host, shipped_table, tuned_table

# Re-exported for the ops: the types of configurations.
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
    """The architecture class of a compute capability (80, 90, ...); None means the interpreter."""
    if capability is None:
        return "interpreter"
    if capability < 80:
        return "sm_75"
    if 100 <= capability < 120:
        return "sm_100"
    return "sm_90" if capability == 90 else "sm_80"


@functools.cache
def dtype_class(dtype: torch.dtype) -> str:
    """The dtype as in ``Key.dtype``."""
    return "half" if _host.is_half(dtype) else str(dtype).removeprefix("torch.")


def first_entry(
    table: Mapping[Key, Any],
    op: str,
    kernel: str,
    capability: int | None,
    dtype: torch.dtype,
    size: int | str = ANY,
    options: tuple[str, ...] = (),
) -> Any:
    """The best entry of ``table`` for a launch, by the rules above.

    Raises:
        KeyError: no entry matches.
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
    """The configuration of a launch in ``TABLE``. Raises KeyError as ``first_entry``."""
    return first_entry(TABLE, op, kernel, capability, dtype, size, options)


# Measured entries by GPU index, with the exact keys of its launches. None stands for the
# interpreter, which has entries only if a test or the tuner adds them.
_TUNED: dict[int | None, dict[Key, Any]] = {None: {}}
_UNKNOWN = object()  # None is a configuration


def tuned(device: torch.device) -> dict[Key, Any]:
    """The entries that take precedence over ``TABLE`` on this device; a GPU must have an index.
    Changes to the dict take effect at the next launch. A GPU's entries are read from the file of
    ``fastgpt tune`` at its first launch."""
    index = device.index if device.type == "cuda" else None
    lines = _TUNED.get(index)
    return read_tuned(device) if lines is None else lines


def read_tuned(device: torch.device) -> dict[Key, Any]:
    """Reread ``tuned`` from the file. A file that is damaged or made for another machine or other
    versions is ignored with a warning."""
    with tuned_table.notice_of_damage(device):
        lines = tuned_table.read(device).get("lines", [])
        found = {decoded_key(line["key"]): decoded(line["config"]) for line in lines}
        return use_tuned(device, found)
    return use_tuned(device, {})


def use_tuned(device: torch.device, lines: dict[Key, Any]) -> dict[Key, Any]:
    """Set ``tuned(device)`` to ``lines``."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    _TUNED[index if device.type == "cuda" else None] = lines
    return lines


def encoded(config: Any) -> Any:
    """A configuration as a JSON value: a string or None unchanged, a named tuple as a list that
    starts with its class name."""
    return [type(config).__name__, *config] if isinstance(config, tuple) else config


def decoded(value: Any) -> Any:
    """The inverse of ``encoded``. Raises ValueError for an unknown class name."""
    if value is None or isinstance(value, str):
        return value
    name, *values = value
    kind = getattr(shipped_table, name, None)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and kind is not Key):
        raise ValueError(f"{name!r} is not a type of configuration")
    return kind(*values)


def decoded_key(value: Any) -> Key:
    """A ``Key`` from its list in a JSON file."""
    return Key._make([*value[:-1], tuple(value[-1])])


def find(x: Tensor, op: str, kernel: str, size: int | str = ANY, *options: str) -> Any:
    """The configuration of a launch whose main operand is ``x``."""
    capability = _host.capability(x.device)
    measured = tuned(x.device)
    if measured:
        # A plain tuple equals a Key and is cheaper to create.
        key = op, kernel, architecture(capability), dtype_class(x.dtype), size, options
        found = measured.get(key, _UNKNOWN)  # type: ignore[call-overload]
        if found is not _UNKNOWN:
            return found
    return lookup(op, kernel, capability, x.dtype, size, options)


@functools.lru_cache(maxsize=None, typed=True)  # typed: tuples of two classes may compare equal
def launch(config: Any) -> dict[str, Any]:
    """A configuration as the kernel's keyword arguments. Launches share the dict: do not modify."""
    given = {k: v for k, v in config._asdict().items() if v is not None and k != "programs"}
    return given | _host.FMA
