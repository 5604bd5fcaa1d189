"""The residual sum and its LayerNorm, forward and backward. Without dropout, whose masks are drawn
differently by each provider.
"""

from typing import Any

from torch import Tensor

from bench import bench_layer_norm
from bench._ops.op_bench import Draw, Op, Row


def inputs(draw: Draw, M: int, C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return draw(M, C), *bench_layer_norm.inputs(draw, M, C)


def eager(residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + delta
    return bench_layer_norm.eager(total, weight, bias), total


OP = Op(
    name="residual_layer_norm",
    inputs=inputs,
    eager=eager,
    gpu_sizes=bench_layer_norm.OP.gpu_sizes,
    cpu_sizes=bench_layer_norm.OP.cpu_sizes,
)


@OP.rows
def test_residual_layer_norm(row: Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)
