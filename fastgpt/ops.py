"""Dispatch of the ops by device: CUDA tensors go to the Triton kernels that their GPU can run, all
others to PyTorch's operators. This is the only place that dispatches.

The ops have the signatures and the documentation of ``kernels.reference``. A model takes this
module, or one of ``kernels``: ``reference``, ``torch_ops``, ``fused`` or ``fused_rows``, as in
``GPT(config, ops=fused)``.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgpt import devices
from fastgpt.kernels import reference, torch_ops
from fastgpt.kernels._checks import Recompute as Recompute

if TYPE_CHECKING:
    from fastgpt.kernels.reference import *  # noqa: F403

# ``_facts`` by the index of the GPU
_known: dict[int | None, tuple[str, bool]] = {}


def _facts(device: torch.device) -> tuple[str, bool]:
    """Why the Triton kernels do not run ("" if they do); whether the matrix products run too."""
    reason = devices.triton_refusal(device)
    return reason, not reason and devices.triton_multiplies(device)


def _implementation(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return torch_ops
    if torch.compiler.is_dynamo_compiling():  # the compiled graph would guard on ``_known``
        reason, multiplies = _facts(device)
    else:
        if device.index not in _known:
            _known[device.index] = _facts(device)
        reason, multiplies = _known[device.index]
    if not reason:
        # Imported at the first CUDA tensor, because a CPU run does not need Triton.
        from fastgpt.kernels import fused, fused_rows

        return fused if multiplies else fused_rows
    if not torch.compiler.is_compiling():
        _notice(reason)
    return torch_ops


@functools.cache
def _notice(text: str) -> None:
    """Warn once per process."""
    warnings.warn(text, stacklevel=4)


def _dispatched(name: str) -> Callable[..., Any]:
    """The op ``name``, dispatched on the device of its first argument."""
    plain: Callable[..., Any] = getattr(reference, name)
    first = next(iter(inspect.signature(plain).parameters))

    @functools.wraps(plain)
    def op(*args: Any, **kwargs: Any) -> Any:
        implementation = torch_ops
        try:
            x = args[0] if args else kwargs[first]
            if x.is_cuda:
                implementation = _implementation(x.device)
        except (KeyError, AttributeError):  # missing, or not a tensor: torch_ops raises the error
            pass
        return getattr(implementation, name)(*args, **kwargs)

    op.__module__ = __name__  # for pickle
    return op


globals().update({name: _dispatched(name) for name in reference.OPS})


def dropout_seed(device: torch.device) -> Tensor | None:  # type: ignore[no-redef]
    """The seed of the dropout masks of one step, an int64 tensor (1,) drawn from PyTorch's
    generator. None on devices where PyTorch's generator draws every mask itself."""
    return _implementation(device).dropout_seed(device)


def accumulate(totals: list[Tensor], grads: list[Tensor]) -> None:
    """``totals[i] += grads[i]``. See ``fused.accumulate``."""
    _implementation(totals[0].device).accumulate(totals, grads)


_IN_A_BLOCK = tuple(globals()[name] for name in reference.OPS_OF_A_BLOCK)


def block_kernels(x: Tensor, *ops: Any) -> ModuleType | None:
    """The module that computes these ops of a transformer block in one call: the kernels'
    ``block``. None if the ops are not those of this module, and on devices without it."""
    if not x.is_cuda or ops != _IN_A_BLOCK:
        return None
    kernels = _implementation(x.device)
    if not hasattr(kernels, "block_kernels"):
        return None
    parts = (getattr(kernels, name) for name in reference.OPS_OF_A_BLOCK)
    found: ModuleType | None = kernels.block_kernels(x, *parts)
    return found
