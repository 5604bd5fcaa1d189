"""What ``build_kernels.py`` compiles: ``COMPILED``, case → function, of every ``bench_<op>.py``.

A case calls an op forward and backward on small CPU tensors, with every option that leads to
another launch configuration; only the launches are recorded. Sizes are as divisible by 16 as those
of real models.

    python -m bench._compile.kernel_cases gelu 90      # one case on one architecture, at once

Cases are compiled for one GPU of each class of the launch tables. ``gpt2`` alone repeats them at
GPT-2's sizes for the other GPUs that people own.
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
    """A training step of float32 weights under autocast and a token that is generated, in both
    16-bit dtypes: with dropout and what is recomputed, and in bfloat16 without either. Of fewer
    classes than GPT-2's, which take the same programs."""
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
LEAST_CAPABILITY: dict[str, int] = {}  # of cases that older architectures cannot run
for path in sorted(Path(__file__).parents[1].glob("bench_*.py")):
    module = importlib.import_module(f"bench.{path.stem}")
    CASES |= getattr(module, "COMPILED", {})
    LEAST_CAPABILITY |= getattr(module, "LEAST_CAPABILITY", {})

if __name__ == "__main__":
    sys.exit(case_main(CASES))
