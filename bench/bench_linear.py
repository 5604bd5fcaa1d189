"""Linear with a bias, forward and backward with the gradients of weight and bias; and the kernel
that computes these two gradients, against cuBLAS and a sum.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._ops.op_bench import BF16, FP16, Op, RandomTensors, standard_providers
from fastgpt.kernels import fused, gemm, reference
from fastgpt.kernels._host import matmul_float32


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


def gradient_inputs(random: RandomTensors, M: int, K: int, N: int) -> tuple[Tensor, Tensor]:
    return random.normal(M, N), random.normal(M, K)


def of_weight_gradient(has_bias: bool) -> Op:
    """float32 gradients, as a model with float32 weights has them."""

    def ours(dy: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        dweight, dbias = gemm.weight_gradient(dy, x, has_bias, torch.float32)
        return (dweight,) if dbias is None else (dweight, dbias)

    def cublas(dy: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        dweight = matmul_float32(dy.t(), x)
        return (dweight, dy.sum(0, dtype=torch.float32)) if has_bias else (dweight,)

    def plain(dy: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dy.dtype, torch.float32)
        dweight = dy.t().to(wide) @ x.to(wide)
        return (dweight, dy.sum(0, dtype=wide)) if has_bias else (dweight,)

    return Op(
        name=f"linear: weight{' and bias' if has_bias else ''} gradient",
        inputs=gradient_inputs,
        providers={"fused": ours, "cuBLAS": cublas},
        reference=plain,
        directions=("inference",),
        baseline="cuBLAS",
        counted=None,
        flops=lambda direction, M, K, N: 2 * M * K * N,
        gpu_sizes=[
            *OP.gpu_sizes,
            {"M": 32768, "K": 768, "N": 3072},  # the MLP's
            {"M": 32768, "K": 3072, "N": 768},
            {"M": 65536, "K": 768, "N": 768},  # B=64
        ],
    )


WEIGHT_GRADIENT, WEIGHT_AND_BIAS_GRADIENT = of_weight_gradient(False), of_weight_gradient(True)

test_weight_gradient = WEIGHT_GRADIENT.test()
test_weight_and_bias_gradient = WEIGHT_AND_BIAS_GRADIENT.test()


def compiled() -> None:
    """The weight gradient in parts, with a bias and without, of weights in both dtypes."""
    for random, wide, bias in itertools.product((BF16, FP16), (False, True), (False, True)):
        x, weight, added = inputs(random, 4096, 64, 256)
        if wide:
            weight, added = weight.detach().float().requires_grad_(), added.detach().float()
        fused.linear(x, weight, added.requires_grad_() if bias else None).sum().backward()


COMPILED = {"linear": compiled}
