"""The MLP, forward and backward: Linear, GELU, and Linear without its bias, which the residual sum
adds; and its two products with an epilogue, against cuBLAS.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._ops import product_bench
from bench._ops.op_bench import Draw, Op, Row
from bench._ops.product_bench import ALONE, FUSED, SEPARATE, Product, Results
from fastgpt.kernels import gemm
from fastgpt.kernels.gelu import gelu_backward, gelu_forward


def inputs(draw: Draw, M: int, C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fc_weight, fc_bias = draw(4 * C, C, std=0.02), draw(4 * C, std=0.02)
    return draw(M, C), fc_weight, fc_bias, draw(C, 4 * C, std=0.02)


def eager(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc_weight, fc_bias)), proj_weight)


OP = Op(
    name="mlp",
    inputs=inputs,
    eager=eager,
    gpu_sizes=[
        {"M": 32768, "C": 768},  # GPT-2 124M, B=32, T=1024
        {"M": 16384, "C": 1024},
        {"M": 8192, "C": 1600},  # GPT-2 XL, B=8
        {"M": 16384, "C": 384},  # nanoGPT's character model, B=64, T=256
        {"M": 1024, "C": 768},  # one sequence
    ],
    cpu_sizes=[{"M": 256, "C": 128}],
)


@OP.rows
def test_mlp(row: Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)


def fc_inputs(draw: Draw, M: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias, _ = inputs(draw, M, C)
    return x, weight, bias


def fc(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    pre = F.linear(x, weight, bias)
    return pre, gelu_forward(pre, "none")


def plain_fc(x: Tensor, weight: Tensor, bias: Tensor) -> Results:
    pre = F.linear(x, weight, bias)
    return pre, F.gelu(pre)


def dx_inputs(draw: Draw, M: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(M, C), draw(C, 4 * C, std=0.02), draw(M, 4 * C)


def dx(dy: Tensor, weight: Tensor, pre: Tensor) -> Results:
    return (gelu_backward(dy @ weight, pre, "none"),)


def plain_dx(dy: Tensor, weight: Tensor, pre: Tensor) -> Results:
    return (torch.ops.aten.gelu_backward(dy @ weight, pre),)


def fused_dx(dy: Tensor, weight: Tensor, pre: Tensor) -> Results:
    return (gemm.linear_gelu_gradient(dy, weight, pre, "none", recompute=False)[0],)


def fused_dx_and_act(dy: Tensor, weight: Tensor, pre: Tensor) -> Results:
    dpre, act = gemm.linear_gelu_gradient(dy, weight, pre, "none", recompute=True)
    assert act is not None
    return dpre, act


def flops(M: int, C: int) -> int:
    return 2 * M * C * 4 * C


PRODUCTS = [
    Product(
        op="mlp",
        name="FC, GELU",
        inputs=fc_inputs,
        flops=flops,
        plain=plain_fc,
        ways={
            ALONE: lambda x, weight, bias: (F.linear(x, weight, bias),),
            SEPARATE: fc,
            FUSED: lambda x, weight, bias: gemm.linear_gelu(x, weight, bias, "none"),
        },
        gpu_sizes=OP.gpu_sizes,
        table="fwd",
    ),
    Product(
        op="mlp",
        name="FC2 dX, GELU'",
        inputs=dx_inputs,
        flops=flops,
        plain=plain_dx,
        ways={ALONE: lambda dy, weight, pre: (dy @ weight,), SEPARATE: dx, FUSED: fused_dx},
        gpu_sizes=OP.gpu_sizes,
        table="bwd",
    ),
    Product(
        op="mlp",
        name="FC2 dX, GELU', GELU again",
        inputs=dx_inputs,
        flops=flops,
        plain=lambda dy, weight, pre: (*plain_dx(dy, weight, pre), F.gelu(pre)),
        ways={
            ALONE: lambda dy, weight, pre: (dy @ weight,),
            SEPARATE: lambda dy, weight, pre: (*dx(dy, weight, pre), gelu_forward(pre, "none")),
            FUSED: fused_dx_and_act,
        },
        gpu_sizes=OP.gpu_sizes,
        table="bwd_recompute",
    ),
]


@product_bench.rows(*PRODUCTS)
def test_products(row: product_bench.Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)
