"""The only dispatch: a CUDA tensor goes to the Triton kernels if its GPU can run them, or to those
of them that it can run, any other to PyTorch's own.

The ops, their signatures and their documentation are those of ``kernels.reference``; a model takes
this module or one of ``kernels``: ``reference``, ``torch_ops``, ``fused`` or ``fused_rows``, as in
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

# Of each GPU, by its index: why Triton does not run there, and whether it multiplies.
_known: dict[int | None, tuple[str, bool]] = {}


def _facts(device: torch.device) -> tuple[str, bool]:
    """As ``_known`` holds them."""
    refusal = devices.triton_refusal(device)
    return refusal, not refusal and devices.triton_multiplies(device)


def _implementation(device: torch.device) -> ModuleType:
    if device.type != "cuda":
        return torch_ops
    if torch.compiler.is_dynamo_compiling():  # what is compiled would depend on ``_known``
        refusal, multiplies = _facts(device)
    else:
        if device.index not in _known:
            _known[device.index] = _facts(device)
        refusal, multiplies = _known[device.index]
    if not refusal:
        # At the first CUDA tensor: a CPU run needs no Triton.
        from fastgpt.kernels import fused, fused_rows

        return fused if multiplies else fused_rows
    if not torch.compiler.is_compiling():
        _notice(refusal)
    return torch_ops


@functools.cache
def _notice(text: str) -> None:
    """Once a process."""
    warnings.warn(text, stacklevel=4)


def _dispatched(name: str) -> Callable[..., Any]:
    """The op ``name`` by the kernels for the device of its first argument."""
    plain: Callable[..., Any] = getattr(reference, name)
    first = next(iter(inspect.signature(plain).parameters))

    @functools.wraps(plain)
    def op(*args: Any, **kwargs: Any) -> Any:
        implementation = torch_ops
        try:
            x = args[0] if args else kwargs[first]
            if x.is_cuda:
                implementation = _implementation(x.device)
        except (KeyError, AttributeError):  # missing, or no tensor: torch_ops names it
            pass
        return getattr(implementation, name)(*args, **kwargs)

    op.__module__ = __name__  # where pickle finds it
    return op


globals().update({name: _dispatched(name) for name in reference.OPS})


def dropout_seed(device: torch.device) -> Tensor | None:  # type: ignore[no-redef]
    """The key of the dropout masks of one step, as int64 tensor (1,), drawn from PyTorch's
    generator. None where that generator draws every mask itself."""
    return _implementation(device).dropout_seed(device)


def accumulate(totals: list[Tensor], grads: list[Tensor]) -> None:
    """``totals[i] += grads[i]``. See ``fused.accumulate``."""
    _implementation(totals[0].device).accumulate(totals, grads)


_IN_A_BLOCK = tuple(globals()[name] for name in reference.OPS_OF_A_BLOCK)


def block_kernels(x: Tensor, *ops: Any) -> ModuleType | None:
    """What takes these ops of a transformer block together: the kernels' ``block``. None for other
    ops than these here, and on a device without it."""
    if not x.is_cuda or ops != _IN_A_BLOCK:
        return None
    kernels = _implementation(x.device)
    if not hasattr(kernels, "block_kernels"):
        return None
    parts = (getattr(kernels, name) for name in reference.OPS_OF_A_BLOCK)
    found: ModuleType | None = kernels.block_kernels(x, *parts)
    return found
