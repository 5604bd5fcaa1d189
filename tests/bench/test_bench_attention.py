"""bench/bench_attention.py: the rows of several documents."""

import pytest
import torch

from bench import bench_attention
from bench._ops import op_bench
from bench._ops.op_bench import Subject, cost
from bench._roofline.ceilings import Ceilings

TINY = {"B": 2, "T": 33, "H": 2, "D": 16, "L": 10}


def test_starts() -> None:
    found = bench_attention.starts(2, 12, 5)  # the second sequence begins with a document's third
    assert found.tolist() == [[0] * 5 + [5] * 5 + [10] * 2, [0] * 3 + [3] * 5 + [8] * 4]
    assert found.dtype == torch.int32


@pytest.mark.parametrize("provider", ["fused", "torch_ops", "reference"])
def test_the_check_passes_our_ops(provider: str, device: str) -> None:
    if device != op_bench.DEVICE.type:
        pytest.skip(f"the benchmarks of this machine run on {op_bench.DEVICE.type}")
    op = bench_attention.DOCUMENTS
    subject = Subject(op, tuple(TINY.items()))
    subject.check(provider, op.function(provider))
    with pytest.raises(AssertionError, match="output 0 has an RMS error"):
        subject.check("causal", lambda qkv, n_head, starts: bench_attention.eager(qkv, n_head))


def test_flops_are_those_of_the_documents() -> None:
    """The bytes are those of one document."""
    sizes = {"B": 1, "T": 12, "H": 2, "D": 16}
    pairs = 2 * 5 * 4 // 2 + 1  # documents of 5, 5 and 2 tokens, the diagonal left out
    ceilings = Ceilings("matrix products alone", 1.0, 1e9)
    op = bench_attention.DOCUMENTS
    for direction, products in (("forward", 2), ("backward", 5)):
        total, causal = (
            cost(o, tuple(s.items()), direction, torch.bfloat16, ceilings)  # type: ignore[arg-type]
            for o, s in ((op, {**sizes, "L": 5}), (bench_attention.OP, sizes))
        )
        assert total.flops == products * 2 * 2 * pairs * 16 < causal.flops
        assert total.bytes == causal.bytes
