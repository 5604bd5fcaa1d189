"""The MLP, forward and backward: Linear, GELU, and Linear without its bias, which the residual sum
adds.
"""

from typing import Any

import torch.nn.functional as F
from _op_bench import Draw, Op, Row
from torch import Tensor


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
