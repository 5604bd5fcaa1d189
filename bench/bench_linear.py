"""Linear with a bias, forward and backward with the gradients of weight and bias."""

from typing import Any

import torch.nn.functional as F
from _op_bench import Draw, Op, Row
from torch import Tensor


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
