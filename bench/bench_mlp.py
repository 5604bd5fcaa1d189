"""The MLP, forward and backward: Linear, GELU, and Linear without its bias, which the residual sum
adds. ``fastgpt tune`` compares products with a GELU epilogue to cuBLAS plus a separate GELU kernel.
"""

import torch.nn.functional as F
from torch import Tensor

from bench._ops.op_bench import BF16, FP16, FP32, Op, RandomTensors, standard_providers
from fastgpt.kernels import fused, reference


def inputs(random: RandomTensors, M: int, C: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, fc_weight = random.normal(M, C), random.normal(4 * C, C, std=0.02)
    return x, fc_weight, random.normal(4 * C, std=0.02), random.normal(C, 4 * C, std=0.02)


def eager(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc_weight, fc_bias)), proj_weight)


OP = Op(
    name="mlp",
    inputs=inputs,
    providers=standard_providers("mlp", eager),
    reference=reference.mlp,
    gpu_sizes=[
        {"M": 32768, "C": 768},  # GPT-2 124M, B=32, T=1024
        {"M": 16384, "C": 1024},
        {"M": 8192, "C": 1600},  # GPT-2 XL, B=8
        {"M": 16384, "C": 384},  # nanoGPT's character model, B=64, T=256
        {"M": 1024, "C": 768},  # one sequence
    ],
    cpu_sizes=[{"M": 256, "C": 128}],
    small={"M": 200, "C": 72},
)

test_mlp = OP.test()


def compiled() -> None:
    """Both products with an epilogue and the weight gradients, with and without recomputation."""
    for random, bias, form in (
        *((BF16, bias, form) for bias in (False, True) for form in ("none", "tanh")),
        (FP16, True, "none"),
        (FP32, True, "none"),  # cuBLAS's products
    ):
        x, fc_weight, fc_bias, proj_weight = inputs(random, 256, 64)
        for recompute in (None, (x, FP32.normal(64), None, 1e-5)):
            weights = fc_weight, fc_bias if bias else None, proj_weight
            fused.mlp(x, *weights, approximate=form, recompute=recompute).sum().backward()


COMPILED = {"mlp": compiled}
