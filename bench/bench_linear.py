"""Linear with a bias, forward and backward with the gradients of weight and bias."""

import itertools

import torch.nn.functional as F
from torch import Tensor

from bench._ops.op_bench import BF16, FP16, Op, RandomTensors, standard_providers
from fastgpt.kernels import fused, reference


def inputs(random: RandomTensors, M: int, K: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    return random.normal(M, K), random.normal(N, K, std=0.02), random.normal(N, std=0.02)


OP = Op(
    name="linear",
    inputs=inputs,
    providers=standard_providers("linear", F.linear),
    reference=reference.linear,
    gpu_sizes=[
        {"M": 32768, "K": 768, "N": 2304},  # GPT-2 124M, B=32, T=1024: q, k and v
        {"M": 32768, "K": 768, "N": 768},  # the projection
        {"M": 8192, "K": 1600, "N": 4800},  # GPT-2 XL, B=8: q, k and v
        {"M": 16384, "K": 384, "N": 1152},  # nanoGPT's character model, B=64, T=256
        {"M": 1024, "K": 768, "N": 2304},  # one sequence
    ],
    cpu_sizes=[{"M": 256, "K": 128, "N": 384}],
    small={"M": 200, "K": 136, "N": 264},
)

test_linear = OP.test()


def compiled() -> None:
    """The split weight gradient, with and without a bias, for weights in both dtypes."""
    for random, wide, bias in itertools.product((BF16, FP16), (False, True), (False, True)):
        x, weight, added = inputs(random, 4096, 64, 256)
        if wide:
            weight, added = weight.detach().float().requires_grad_(), added.detach().float()
        fused.linear(x, weight, added.requires_grad_() if bias else None).sum().backward()


COMPILED = {"linear": compiled}
LEAST_CAPABILITY = {"linear": 80}  # sm_75 uses only cuBLAS
