"""The cases of ``build_kernels.py``: ``COMPILED``, case → function, of each ``bench_<op>.py``.

A case calls an op forward and backward on small CPU tensors, with every option that selects another
launch configuration; the launches are only recorded. Sizes are as divisible by 16 as in real
models.

    python -m bench._compile.kernel_cases gelu 90      # one case on one architecture, without ninja

Cases are compiled for one GPU of each class of the launch tables. Only ``gpt2`` covers the other
GPUs that people own, at GPT-2's sizes.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench import bench_adamw, bench_attention_decode
from bench._compile.static import case_main
from bench._ops.op_bench import BF16, FP16
from fastgpt import GPT, GPTConfig
from fastgpt.kernels import _host, fused, fused_rows


def _gpt2() -> None:
    """A training step with float32 weights under autocast and one decoding step, in both 16-bit
    dtypes: with dropout and recomputation, and in bfloat16 without them. The vocabulary is smaller
    than GPT-2's, but compiles to the same programs."""
    idx = torch.zeros(1, 64, dtype=torch.int64)
    ops = fused_rows if _host.capability(torch.device("cpu")) == 75 else fused
    for dtype, dropout, recompute in (
        (torch.bfloat16, 0.0, False),
        (torch.bfloat16, 0.1, True),
        (torch.float16, 0.1, True),
    ):
        config = GPTConfig(block_size=64, vocab_size=5120, n_layer=1, dropout=dropout)
        model = GPT(config, ops=ops, recompute=recompute)
        with torch.autocast("cpu", dtype):
            loss = model(idx, idx)[1]
        loss.backward()
    bench_adamw.compiled()
    for random in (BF16, FP16):
        fused.attention_decode(*bench_attention_decode.inputs(random, 2, 1024, 12, 64))


CASES: dict[str, Callable[[], object]] = {"gpt2": _gpt2}
LEAST_CAPABILITY: dict[str, int] = {}  # for cases that older architectures cannot run
for path in sorted(Path(__file__).parents[1].glob("bench_*.py")):
    module = importlib.import_module(f"bench.{path.stem}")
    CASES |= getattr(module, "COMPILED", {})
    LEAST_CAPABILITY |= getattr(module, "LEAST_CAPABILITY", {})

if __name__ == "__main__":
    sys.exit(case_main(CASES))
