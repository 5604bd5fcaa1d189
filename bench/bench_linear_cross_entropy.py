"""Head and loss, and the fp8 mode against bf16. The fused op computes the gradients in the forward,
so the loss alone is timed under no_grad, and otherwise both passes together.

In the fp8 comparison, both rows use the bytes and FLOPs of fp8, with products at twice the
machine's bf16 rate.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench._ops.op_bench import (
    BF16,
    FP16,
    FP32,
    Function,
    Op,
    RandomTensors,
    standard_providers,
)
from fastgpt.kernels import fused, reference

_ROWS = 1024  # rows whose reference logits are in memory at a time


def inputs(random: RandomTensors, M: int, C: int, V: int) -> tuple[Tensor, Tensor, Tensor]:
    return random.normal(M, C), random.normal(V, C, std=0.02), random.ids(V, M)


def eager(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits, then the loss in float32 as under autocast."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=-1)


def liger(x: Tensor, weight: Tensor, targets: Tensor) -> Any:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, targets, ignore_index=-1)


def quack(x: Tensor, weight: Tensor, targets: Tensor) -> Any:
    """Chosen as in QuACK's module: in chunks if its GEMMs can load them, else with all logits."""
    from quack.linear_cross_entropy import (
        chunked_linear_cross_entropy,
        linear_cross_entropy_func,
    )

    if any(size % 8 for size in (*x.shape, len(weight))):
        return linear_cross_entropy_func(x, weight, None, targets, ignore_index=-1)
    return chunked_linear_cross_entropy(x, weight, targets, ignore_index=-1)


def in_slices(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The reference op over slices of rows, whose logits are recomputed in the backward."""

    def summed(x: Tensor, targets: Tensor) -> Tensor:
        return reference.linear_cross_entropy(x, weight, targets, reduction="sum")

    slices = zip(x.split(_ROWS), targets.split(_ROWS), strict=True)
    losses = [checkpoint(summed, rows, ids, use_reentrant=False) for rows, ids in slices]
    return torch.stack(losses).sum() / len(targets)


OP = Op(
    name="linear_cross_entropy",
    inputs=inputs,
    providers=standard_providers("linear_cross_entropy", eager, liger=liger, quack=quack),
    reference=in_slices,
    directions=("inference", "forward+backward"),
    gpu_sizes=[
        {"M": 32768, "C": 768, "V": 50304},  # GPT-2 124M, B=32, T=1024
        {"M": 32768, "C": 768, "V": 50257},
        {"M": 8192, "C": 1600, "V": 50304},  # GPT-2 XL, B=8
        {"M": 16384, "C": 384, "V": 65},  # nanoGPT's character model, B=64, T=256
    ],
    cpu_sizes=[{"M": 64, "C": 64, "V": 50257}],
    small={"M": 33, "C": 64, "V": 1003},
)

test_linear_cross_entropy = OP.test()


def check_fp8(provider: str, function: Function, inputs: tuple[Any, ...]) -> None:
    """Raise AssertionError if the op deviates from its emulation on some of the rows, relative to a
    tensor's norm, by more than 1% in the loss or 3% in a gradient, which is rounded twice.
    """
    x, weight, targets = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (x[:_ROWS], weight)]
    emulation = partial(reference.linear_cross_entropy, fp8=provider == "fp8")

    def results(op: Function) -> list[Tensor]:
        out = op(*leaves, targets[:_ROWS])
        return [out.detach(), *torch.autograd.grad(out, leaves)]

    pairs = zip(results(function), results(emulation), strict=True)
    for number, (got, near) in enumerate(pairs):
        error = float((got.float() - near.float()).norm() / near.float().norm())
        allowed = 0.03 if number else 0.01
        assert error <= allowed, (
            f"linear_cross_entropy by {provider}: {'gradient' if number else 'output'} deviates "
            f"by {error:.3g} from its emulation, at most {allowed} is allowed"
        )


FP8 = Op(
    name="linear_cross_entropy in fp8",
    inputs=inputs,
    providers={
        "fp8": partial(fused.linear_cross_entropy, fp8=True),
        "half": fused.linear_cross_entropy,
    },
    reference=in_slices,
    directions=OP.directions,
    baseline="half",
    counted="fp8",
    check=check_fp8,
    gpu_sizes=OP.gpu_sizes[:1],
)

test_fp8 = FP8.test()


def compiled(fp8: bool) -> None:
    """With gradients, with and without label smoothing; and without gradients."""
    if fp8:
        cases = [(random, 256, 64, 50304) for random in (BF16, FP16)]
    else:  # a tile for each power of two up to 2048 classes
        cases = [(random, 8, 16, V) for random in (BF16, FP32) for V in (65, 50257, 50304)]
        cases += [(FP32, 8, 16, V) for V in (500, 1000, 2000)]
    for random, M, C, V in cases:
        x, weight, targets = inputs(random, M, C, V)
        if fp8:
            weight = FP32.normal(V, C)
        for smoothing in (0.0, 0.1) if V > 2000 else (0.1,):
            options: dict[str, Any] = {"label_smoothing": smoothing, "fp8": fp8}
            fused.linear_cross_entropy(x, weight, targets, **options).backward()
        with torch.no_grad():
            fused.linear_cross_entropy(x, weight, targets, fp8=fp8)


COMPILED = {"linear_cross_entropy": partial(compiled, False), "fp8": partial(compiled, True)}
LEAST_CAPABILITY = {"fp8": 89}
