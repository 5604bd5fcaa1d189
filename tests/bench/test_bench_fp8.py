"""bench/bench_fp8.py: what it checks and what it counts."""

import math

import pytest
import torch

from bench import bench_fp8, bench_linear_cross_entropy
from bench._ops import op_bench
from bench._roofline.ceilings import Ceilings


@pytest.mark.parametrize("provider", ["fp8", "bf16"])
def test_benchmark_checks_what_it_times(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = bench_fp8.LOSS
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
    sizes = {"M": 1024, "C": 768, "V": 2304}
    ceilings = Ceilings("", 1.0, 1e9)
    fp8, bf16 = (
        op_bench.cost(op, tuple(sizes.items()), "inference", torch.bfloat16, ceilings)
        for op in (bench_fp8.LOSS, bench_linear_cross_entropy.OP)
    )
    assert fp8.flops == bf16.flops == 2 * math.prod(sizes.values())
    assert 2 * fp8.ms == pytest.approx(bf16.ms, rel=1e-3)
