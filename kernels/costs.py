"""What an operator costs that PyTorch sees as one opaque call: the kernels inside it, each with its
floating-point operations and its bytes of device memory.

One formula serves two readers: ``torch.utils.flop_counter`` gets the sum of the FLOPs (once
``fused`` was imported), and ``bench/roofline.py`` every kernel for itself. An operator without a
formula is taken for one kernel that reads its inputs, writes its outputs and multiplies no
matrices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverloadPacket


class KernelCost(NamedTuple):
    """One launch, or a loop of equal ones."""

    name: str
    flops: int  # of matrix products alone, 2 M N K each, as PyTorch counts them
    bytes: int  # read plus written in device memory; what a cache serves again is counted once
    fp8: bool = False  # the matrices multiplied have 8 bits


CostFormula = Callable[..., list[KernelCost]]

COSTS: dict[OpOverloadPacket, CostFormula] = {}


def register_cost(op: OpOverloadPacket) -> Callable[[CostFormula], CostFormula]:
    """Decorates the cost formula of ``op`` (``torch.ops.fastgpt.attention``, say).

    The formula is called as ``formula(out, *args)``: what the operator returned, then its
    arguments, the tensors among them often fake. Shapes and dtypes are all that it may read.
    """

    def register(formula: CostFormula) -> CostFormula:
        COSTS[op] = formula
        return formula

    return register


def _flops(formula: CostFormula, *args: Any, out_val: Any, **kwargs: Any) -> int:
    return sum(kernel.flops for kernel in formula(out_val, *args, **kwargs))


@functools.cache
def publish() -> None:
    """Hand the formulas to PyTorch's FLOP counter. Not done by ``register_cost``, because the
    counter imports Triton, or warns that there is none, and a CPU run needs neither."""
    from torch.utils.flop_counter import register_flop_formula

    for op, formula in COSTS.items():
        register_flop_formula(op, get_raw=True)(functools.partial(_flops, formula))


def nbytes(*tensors: Tensor | None) -> int:
    """The bytes of the elements of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def attention_pairs(n_queries: int, n_keys: int, causal: bool) -> int:
    """How many scores of one head are computed: with a causal mask, those under the diagonal, taken
    as half of a square."""
    if not causal:
        return n_queries * n_keys
    square = min(n_queries, n_keys)
    return square * square // 2 + (n_queries - square) * n_keys
