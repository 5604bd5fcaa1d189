"""PyTorch's operators computed in one fixed way, so that a dtype's error is the same on every CPU.

PyTorch's CPU kernels and its BLAS choose the order of their sums, and sometimes the precision of
intermediate results, by the CPU's vector instructions, so bounds taken from their errors differ
between machines. ``RoundedOnce`` computes every operator in float64 and rounds its results once, to
the dtype that PyTorch gives them. A matrix product is summed in float32 in the order of k, with one
rounding per term, like on a GPU without tensor cores.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tools.trees import leaves, mapped


def _is_narrow(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _widened(tree: Any) -> Any:
    return mapped(lambda x: x.double() if _is_narrow(x) else x, tree)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """(..., M, K) @ (..., K, N) in float32, returned in float64."""
    total = a.new_zeros(*a.shape[:-1], b.shape[-1])
    rounded = torch.empty_like(total, dtype=torch.float32)
    for k in range(a.shape[-1]):
        rounded.copy_(total.addcmul_(a[..., k, None], b[..., k, None, :]))
        total.copy_(rounded)
    return total


def _product_and_sum(c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * c + alpha * _product(a, b)


_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm: _product,
    torch.ops.aten.bmm: _product,
    torch.ops.aten.addmm: _product_and_sum,
    torch.ops.aten.baddbmm: _product_and_sum,
}


def _exact(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if func.overloadpacket not in _PRODUCTS:
        return func(*args, **kwargs)
    out = kwargs.pop("out", None)
    product = _PRODUCTS[func.overloadpacket](*args, **kwargs)
    return product if out is None else out.copy_(product)


class RoundedOnce(TorchDispatchMode):
    """Applies to all operators on tensors below float64, including those in autograd's backward."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace != "aten":  # composed in Python of operators that are seen here
            with self:
                return func(*args, **kwargs)
        changed = [i for i, x in enumerate(func._schema.arguments) if x.is_write]
        is_view = any(x.alias_info for x in func._schema.returns) and not changed
        is_view = is_view or torch.Tag.inplace_view in func.tags  # squeeze_ changes no number
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if is_view or is_random or not any(map(_is_narrow, leaves((args, kwargs)))):
            return func(*args, **kwargs)
        wide_args, wide_kwargs = _widened((args, kwargs))
        if not changed:
            dtypes = [getattr(x, "dtype", None) for x in leaves(func(*args, **kwargs))][::-1]
            exact = _exact(func, wide_args, wide_kwargs)
            return mapped(lambda x: x if (dtype := dtypes.pop()) is None else x.to(dtype), exact)
        _exact(func, wide_args, dict(wide_kwargs))
        for i in changed:
            name = func._schema.arguments[i].name
            narrow, wide = (
                (kwargs[name], wide_kwargs[name]) if name in kwargs else (args[i], wide_args[i])
            )
            narrow.copy_(wide)
        return narrow
