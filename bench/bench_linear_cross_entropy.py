"""Head and loss. Fused, the gradients are computed in the forward pass, so the loss alone is timed
under no_grad, and with a graph both passes together. And the three products of both passes, bare,
against the fused op.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench._ops import product_bench
from bench._ops.op_bench import Draw, Op, Row
from bench._ops.product_bench import ALONE, FUSED, SEPARATE, Product, Results
from fastgpt.kernels import fused, reference
from fastgpt.kernels._host import matmul_float32

_TRUTH_ROWS = 1024  # whose logits are in memory at a time


def inputs(draw: Draw, M: int, C: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(M, C), draw(V, C, std=0.02), draw.ids(V, M)


def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """With the loss in float32, as autocast does it."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1)


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, targets, ignore_index=-1)


def truth(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Over slices of rows, whose logits are computed again in the backward pass."""
    slices = zip(x.split(_TRUTH_ROWS), targets.split(_TRUTH_ROWS), strict=True)
    losses = [checkpoint(_summed, rows, weight, ids, use_reentrant=False) for rows, ids in slices]
    return torch.stack(losses).sum() / len(targets)


def _summed(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return reference.linear_cross_entropy(x, weight, targets, reduction="sum")


OP = Op(
    name="linear_cross_entropy",
    inputs=inputs,
    eager=eager,
    liger=liger,
    truth=truth,
    directions=("inference", "forward+backward"),
    gpu_sizes=[
        {"M": 32768, "C": 768, "V": 50304},  # GPT-2 124M, B=32, T=1024
        {"M": 32768, "C": 768, "V": 50257},
        {"M": 8192, "C": 1600, "V": 50304},  # GPT-2 XL, B=8
        {"M": 16384, "C": 384, "V": 65},  # nanoGPT's character model, B=64, T=256
    ],
    cpu_sizes=[{"M": 64, "C": 64, "V": 50257}],
)


@OP.rows
def test_linear_cross_entropy(row: Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)


def three_products(x: Tensor, weight: Tensor, targets: Tensor) -> Results:
    """The logits, which stand for their own gradient, dx and dweight."""
    logits = x @ weight.t()
    return logits @ weight, matmul_float32(logits.t(), x)


def with_gradients(op: Callable[..., Tensor]) -> Callable[..., Results]:
    """The loss, dx and dweight."""

    def run(x: Tensor, weight: Tensor, targets: Tensor) -> Results:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = op(*leaves, targets)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return run


PRODUCTS = [
    Product(
        op="linear_cross_entropy",
        name="logits, dX, dW",
        inputs=inputs,
        flops=lambda M, C, V: 3 * 2 * M * C * V,
        plain=with_gradients(truth),
        ways={
            ALONE: three_products,
            SEPARATE: with_gradients(eager),
            FUSED: with_gradients(fused.linear_cross_entropy),
        },
        gpu_sizes=OP.gpu_sizes,
    ),
]


@product_bench.rows(*PRODUCTS)
def test_products(row: product_bench.Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)
