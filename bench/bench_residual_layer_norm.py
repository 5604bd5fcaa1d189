"""The residual sum and its LayerNorm, forward and backward. Without dropout, whose masks are drawn
differently by each provider.
"""

from typing import Any

import torch.nn.functional as F
from _op_bench import Draw, Op, Row
from torch import Tensor


def inputs(draw: Draw, M: int, C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return draw(M, C), draw(M, C), draw(C), draw(C)


def eager(residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + delta
    return F.layer_norm(total, total.shape[-1:], weight, bias, 1e-5), total


OP = Op(
    name="residual_layer_norm",
    inputs=inputs,
    eager=eager,
    gpu_sizes=[
        {"M": 32768, "C": 768},  # GPT-2 124M, B=32, T=1024
        {"M": 16384, "C": 384},  # nanoGPT's character model, B=64, T=256
        {"M": 16384, "C": 1024},
        {"M": 8192, "C": 1280},
        {"M": 8192, "C": 1600},
    ],
    cpu_sizes=[{"M": 256, "C": 384}],
)


@OP.rows
def test_residual_layer_norm(row: Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)
