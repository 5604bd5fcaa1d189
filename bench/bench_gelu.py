"""GELU, forward and backward."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench._ops.op_bench import Draw, Op, Row


def inputs(draw: Draw, M: int, N: int) -> tuple[Tensor]:
    return (draw(M, N),)


OP = Op(
    name="gelu",
    inputs=inputs,
    eager=F.gelu,
    gpu_sizes=[
        {"M": 32768, "N": 3072},  # GPT-2 124M, B=32, T=1024
        {"M": 8192, "N": 6400},  # GPT-2 XL, B=8
        {"M": 1024, "N": 3072},  # fits into the cache
    ],
    cpu_sizes=[{"M": 256, "N": 512}],
)


@OP.rows
def test_gelu(row: Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)
