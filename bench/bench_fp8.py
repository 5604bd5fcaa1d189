"""Head and loss in fp8 beside the same in bf16.

Bytes, FLOPs and the share of the ceiling are those of fp8 for both, its products at twice the
machine's rate for bf16. Before it is timed, an op is compared with its emulation on some of the
rows: relative to a tensor's norm, outputs may differ by 1% and gradients by 3%. (With Hopper's fast
sums; a gradient besides passes through two roundings that may fall differently.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import bench_linear_cross_entropy
from bench._ops import op_bench
from bench._ops.op_bench import DEVICE, DTYPE, Draw, Op, Row, gradients_like, prepared, timed
from fastgpt.kernels import reference

_CHECKED_ROWS = 1024


@dataclass(frozen=True, eq=False)
class Fp8Op(Op):
    def function(self, provider: str) -> Callable[..., Any]:
        return partial(super().function("fused"), fp8=provider != "bf16")


LOSS = Fp8Op(
    name="linear_cross_entropy",
    inputs=bench_linear_cross_entropy.inputs,
    eager=bench_linear_cross_entropy.OP.eager,
    directions=("inference", "forward+backward"),
    gpu_sizes=[{"M": 32768, "C": 768, "V": 50304}],  # GPT-2 124M, B=32, T=1024
    cpu_sizes=[],
)


def why_not() -> str | None:
    if DEVICE.type != "cuda":
        return "fp8 products need a CUDA GPU"
    if torch.cuda.get_device_capability(DEVICE) < (8, 9):
        return "this GPU has no fp8 products: they need compute capability 8.9 or newer"
    return None


def rows() -> list[Any]:
    reason = why_not()
    found = []
    for sizes in LOSS.gpu_sizes:
        for direction in LOSS.directions:
            for provider in ("fp8", "bf16"):
                row = Row(LOSS, tuple(sizes.items()), direction, provider)
                group = f"fp8 {LOSS.name} {row.shape} {direction}"
                marks = [pytest.mark.benchmark(group=group, timer=row.stopwatch.read)]
                if reason is not None:
                    marks.append(pytest.mark.skip(reason=reason))
                name = f"{LOSS.name}-{row.shape}-{direction}-{provider}"
                found.append(pytest.param(row, id=name, marks=marks))
    return found


def check(row: Row, inputs: tuple[Any, ...]) -> None:
    """AssertionError where an output or a gradient is not what the emulation says."""
    x, weight, targets = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (x[:_CHECKED_ROWS], weight)]
    plain = partial(getattr(reference, row.op.name), fp8=row.provider == "fp8")

    def results(op: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        out = op(*leaves, targets[:_CHECKED_ROWS])
        return [out.detach(), *torch.autograd.grad(out, leaves, gradients_like(out))]

    pairs = zip(results(row.op.function(row.provider)), results(plain), strict=True)
    for number, (got, near) in enumerate(pairs):
        error = float((got.float() - near.float()).norm() / near.float().norm())
        allowed = 0.03 if number else 0.01
        assert error <= allowed, (
            f"{row}: {'gradient' if number else 'output'} deviates by {error:.3g} from its "
            f"emulation, allowed are {allowed}"
        )


def measure(row: Row, benchmark: Any, record_property: Callable[[str, Any], None]) -> None:
    torch.manual_seed(0)
    inputs = row.op.inputs(Draw(DEVICE, DTYPE), **dict(row.sizes))
    check(row, inputs)
    function = row.op.function(row.provider)
    with torch.no_grad():
        out_grads = gradients_like(function(*inputs))
    ms = timed(
        benchmark,
        row.stopwatch,
        partial(prepared, row.direction, function, inputs, out_grads),
    )
    figures = row.figures(ms, op_bench.machine_ceilings())
    benchmark.extra_info.update(figures)
    record_property("figures", figures)


@pytest.mark.parametrize("row", rows())
def test_fp8(row: Row, benchmark: Any, record_property: Any) -> None:
    measure(row, benchmark, record_property)
