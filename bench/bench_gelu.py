"""GELU, forward and backward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._ops.op_bench import BF16, FP16, FP32, Op, RandomTensors, standard_providers
from fastgpt.kernels import fused, reference
from fastgpt.kernels.gelu import gelu_backward_rows_


def inputs(random: RandomTensors, M: int, N: int) -> tuple[Tensor]:
    return (random.normal(M, N),)


OP = Op(
    name="gelu",
    inputs=inputs,
    providers=standard_providers("gelu", F.gelu),
    reference=reference.gelu,
    gpu_sizes=[
        {"M": 32768, "N": 3072},  # GPT-2 124M, B=32, T=1024
        {"M": 8192, "N": 6400},  # GPT-2 XL, B=8
        {"M": 1024, "N": 3072},  # fits into the cache
    ],
    cpu_sizes=[{"M": 256, "N": 512}],
    small={"M": 33, "N": 200},
)

test_gelu = OP.test()


def compiled() -> None:
    for random in (BF16, FP16, FP32):
        for form in ("none", "tanh"):
            fused.gelu(random.normal(4096), form).sum().backward()
            dy, x = random.normal(128, 256), random.normal(128, 256)
            gelu_backward_rows_(dy, x, form, None, None, 64)
            gelu_backward_rows_(dy, x, form, torch.empty_like(x), FP32.normal(1, 2, 256), 64)


COMPILED = {"gelu": compiled}
