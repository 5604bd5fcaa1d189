"""The MLP, forward and backward: Linear, GELU, and Linear without its bias, which the residual sum
adds; and its products with a GELU epilogue, against cuBLAS with GELU as a kernel of its own, which
is what a launch table without a tile gets.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bench._ops.op_bench import BF16, FP16, FP32, Op, RandomTensors, standard_providers
from fastgpt.kernels import fused, gemm, reference
from fastgpt.kernels.gelu import gelu_backward_rows_, gelu_forward


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


def flops(direction: str, M: int, C: int) -> int:
    return 2 * M * C * 4 * C


def fc_inputs(random: RandomTensors, M: int, C: int) -> tuple[Tensor, ...]:
    return inputs(random, M, C)[:3]


def fc_cublas(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, weight, bias)
    return pre, gelu_forward(pre, "none")


def fc_plain(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, weight, bias)
    return pre, F.gelu(pre)


FC = Op(
    name="mlp: fc and gelu",
    inputs=fc_inputs,
    providers={
        "fused": lambda x, weight, bias: gemm.linear_gelu(x, weight, bias, "none"),
        "cuBLAS": fc_cublas,
    },
    reference=fc_plain,
    directions=("inference",),
    baseline="cuBLAS",
    counted=None,
    flops=flops,
    gpu_sizes=OP.gpu_sizes,
)

test_fc = FC.test()


def fc_gradient_inputs(random: RandomTensors, M: int, C: int) -> tuple[Tensor, ...]:
    dy, proj_weight = random.normal(M, C), random.normal(C, 4 * C, std=0.02)
    return dy, proj_weight, random.normal(M, 4 * C)


def of_fc_gradient(recompute: bool) -> Op:
    """The gradients of FC's output and bias; with ``recompute`` GELU's output again, for dW."""

    def fused(dy: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
        dpre, act, dbias = gemm.linear_gelu_gradient(
            dy, weight, pre, "none", recompute=recompute, dbias_dtype=dy.dtype
        )
        return tuple(t for t in (dpre, act, dbias) if t is not None)

    def cublas(dy: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
        dpre, act = dy @ weight, [torch.empty_like(pre)] if recompute else []
        parts = dpre.new_empty(1, -(-len(pre) // gemm.ROWS), pre.shape[1], dtype=torch.float32)
        gelu_backward_rows_(dpre, pre, "none", act[0] if act else None, parts, gemm.ROWS)
        return (dpre, *act, parts[0].sum(0).to(dy.dtype))

    def plain(dy: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, ...]:
        dpre = torch.ops.aten.gelu_backward(dy @ weight, pre)
        return (dpre, *([F.gelu(pre)] if recompute else []), dpre.sum(0))

    return Op(
        name=f"mlp: fc2 dx and gelu gradient{', recompute' if recompute else ''}",
        inputs=fc_gradient_inputs,
        providers={"fused": fused, "cuBLAS": cublas},
        reference=plain,
        directions=("inference",),
        baseline="cuBLAS",
        counted=None,
        flops=flops,
        gpu_sizes=OP.gpu_sizes,
    )


FC_GRADIENT, FC_GRADIENT_RECOMPUTE = of_fc_gradient(False), of_fc_gradient(True)

test_fc_gradient = FC_GRADIENT.test()
test_fc_gradient_recompute = FC_GRADIENT_RECOMPUTE.test()


def compiled() -> None:
    """Both products with an epilogue and the weight gradients, keeping all and recomputing."""
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
