"""bench/bench_fp8.py: what it checks and what it counts."""

import math

import pytest
import torch

from bench import bench_fp8, bench_linear
from bench._ops import op_bench
from bench._roofline.ceilings import Ceilings

LAYER = {"M": 1024, "K": 768, "N": 2304}


@pytest.mark.parametrize("provider", ["fp8", "bf16"])
@pytest.mark.parametrize("op", ["LINEAR", "LOSS"])
def test_benchmark_checks_what_it_times(
    op: str, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = getattr(bench_fp8, op)
    sizes = {name: 48 for name in chosen.gpu_sizes[0]}
    row = op_bench.Row(chosen, tuple(sizes.items()), chosen.directions[-1], provider)
    inputs = chosen.inputs(op_bench.Draw(torch.device("cpu"), torch.bfloat16), **sizes)
    bench_fp8.check(row, inputs)
    other = {"fp8": "bf16", "bf16": "fp8"}[provider]
    wrong = chosen.function(other)
    monkeypatch.setattr(bench_fp8.Fp8Op, "function", lambda self, provider: wrong)
    with pytest.raises(AssertionError, match="deviates by"):
        bench_fp8.check(row, inputs)


def test_benchmark_counts_products_at_twice_the_rate() -> None:
    found = [
        op_bench.cost(op, tuple(LAYER.items()), "forward", torch.bfloat16, ceilings)
        for op, ceilings in (
            (bench_fp8.LINEAR, Ceilings("", 1.0, 1e9)),
            (bench_linear.OP, Ceilings("", 1.0, 1e9)),
        )
    ]
    assert found[0].flops == found[1].flops == 2 * math.prod(LAYER.values())
    assert 2 * found[0].ms == pytest.approx(found[1].ms)
