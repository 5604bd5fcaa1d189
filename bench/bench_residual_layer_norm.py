"""The residual sum and its LayerNorm, forward and backward. Without dropout, because each provider
draws different masks.
"""

import torch
from torch import Tensor

from bench import bench_layer_norm
from bench._ops.op_bench import BF16, FP16, FP32, Op, RandomTensors, standard_providers
from fastgpt.kernels import fused, reference


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
    small={"M": 37, "C": 200},
)

test_residual_layer_norm = OP.test()


def compiled() -> None:
    """Every tile with all options; at GPT-2's width also without dropout, and without biases."""
    widths = (65, 384, 768, 1600, 4096, 8192, 16384)
    for random, stream, of_pair in (
        (BF16, BF16, widths),
        (FP32, FP32, widths),
        (FP16, FP32, (768, 8192)),
    ):
        for width in of_pair:
            weight, bias, delta_bias = (FP32.normal(width) for _ in range(3))
            residual, delta = stream.normal(64, width), random.normal(64, width)
            for dropout_p in (0.0, 0.1) if width == 768 else (0.1,):
                y, total = fused.residual_layer_norm(
                    residual, delta, weight, bias, delta_bias=delta_bias, dropout_p=dropout_p
                )
                torch.autograd.backward((y, total), (y, total))
            if width == 768:
                fused.residual_layer_norm(residual, delta, weight)[0].sum().backward()


COMPILED = {"residual_layer_norm": compiled}
