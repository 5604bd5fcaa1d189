"""Linear with a bias, forward and backward with the gradients of weight and bias; and the product
that makes the weight's gradient, against cuBLAS.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._ops import product_bench
from bench._ops.op_bench import Draw, Op, Row
from bench._ops.product_bench import ALONE, FUSED, SEPARATE, Product, Results
from fastgpt.kernels import gemm
from fastgpt.kernels._host import matmul_float32


def inputs(draw: Draw, M: int, K: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    return draw(M, K), draw(N, K, std=0.02), draw(N, std=0.02)


OP = Op(
    name="linear",
    inputs=inputs,
    eager=F.linear,
    gpu_sizes=[
        {"M": 32768, "K": 768, "N": 2304},  # GPT-2 124M, B=32, T=1024: q, k and v
        {"M": 32768, "K": 768, "N": 768},  # the projection
        {"M": 8192, "K": 1600, "N": 4800},  # GPT-2 XL, B=8: q, k and v
        {"M": 16384, "K": 384, "N": 1152},  # nanoGPT's character model, B=64, T=256
        {"M": 1024, "K": 768, "N": 2304},  # one sequence
    ],
    cpu_sizes=[{"M": 256, "K": 128, "N": 384}],
)


@OP.rows
def test_linear(row: Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)


def dweight_inputs(draw: Draw, M: int, K: int, N: int) -> tuple[Tensor, Tensor]:
    return draw(M, N), draw(M, K)


def dweight(dy: Tensor, x: Tensor) -> Results:
    """Rounded once, as a model with float32 weights has it."""
    return matmul_float32(dy.t(), x), dy.sum(0, dtype=torch.float32)


def fused_dweight(dy: Tensor, x: Tensor) -> Results:
    gradient, dbias = gemm.weight_gradient(dy, x, True, torch.float32)
    assert dbias is not None
    return gradient, dbias


PRODUCTS = [
    Product(
        op="linear",
        name="dW, dbias",
        inputs=dweight_inputs,
        flops=lambda M, K, N: 2 * M * K * N,
        plain=lambda dy, x: (dy.t() @ x, dy.sum(0)),
        ways={
            ALONE: lambda dy, x: (matmul_float32(dy.t(), x),),
            SEPARATE: dweight,
            FUSED: fused_dweight,
        },
        gpu_sizes=[
            *OP.gpu_sizes,
            {"M": 32768, "K": 768, "N": 3072},  # the MLP's
            {"M": 32768, "K": 3072, "N": 768},
            {"M": 65536, "K": 768, "N": 768},  # B=64
        ],
        table="weight",
    ),
]


@product_bench.rows(*PRODUCTS)
def test_products(row: product_bench.Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)
