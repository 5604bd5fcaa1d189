"""LayerNorm, forward and backward with the gradients of weight and bias.

QuACK's LayerNorm is left out: it supports only float32 weights and no autograd.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench._ops.op_bench import BF16, FP32, Op, RandomTensors, standard_providers
from fastgpt.kernels import fused, reference


def inputs(random: RandomTensors, M: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    return random.normal(M, C), random.normal(C), random.normal(C)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    from liger_kernel.transformers.functional import liger_layer_norm

    return liger_layer_norm(x, weight, bias, 1e-5)


OP = Op(
    name="layer_norm",
    inputs=inputs,
    providers=standard_providers("layer_norm", eager, liger=liger),
    reference=reference.layer_norm,
    gpu_sizes=[
        {"M": 32768, "C": 768},  # GPT-2 124M, B=32, T=1024
        {"M": 16384, "C": 384},  # nanoGPT's character model, B=64, T=256
        {"M": 16384, "C": 1024},
        {"M": 8192, "C": 1280},
        {"M": 8192, "C": 1600},
    ],
    cpu_sizes=[{"M": 256, "C": 384}],
    small={"M": 37, "C": 200},
)

test_layer_norm = OP.test()


def compiled() -> None:
    """Three of the tiles; ``bench_residual_layer_norm`` compiles all of them with the sum."""
    for random in (BF16, FP32):
        for width in (65, 768, 16384):
            x, weight, bias = inputs(random, 64, width)
            fused.layer_norm(x, weight, bias).sum().backward()
        x, weight, _ = inputs(random, 64, 768)
        fused.layer_norm(x, weight).sum().backward()


COMPILED = {"layer_norm": compiled}
