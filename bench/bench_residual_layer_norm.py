"""The residual sum and its LayerNorm, forward and backward. Without dropout, whose masks are drawn
differently by each provider.
"""

from torch import Tensor

from bench import bench_layer_norm
from bench._ops.op_bench import Op, RandomTensors, standard_providers
from fastgpt.kernels import reference


def inputs(random: RandomTensors, M: int, C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return random.normal(M, C), *bench_layer_norm.inputs(random, M, C)


def eager(residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + delta
    return bench_layer_norm.eager(total, weight, bias), total


OP = Op(
    name="residual_layer_norm",
    inputs=inputs,
    providers=standard_providers("residual_layer_norm", eager),
    reference=reference.residual_layer_norm,
    gpu_sizes=bench_layer_norm.OP.gpu_sizes,
    cpu_sizes=bench_layer_norm.OP.cpu_sizes,
    table="layer_norm",
    small={"M": 37, "C": 200},
)

test_residual_layer_norm = OP.test()
