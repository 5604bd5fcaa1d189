"""What ``build_kernels.py`` compiles: ``COMPILED``, case → function, of every ``bench_<op>.py``.

A case calls an op forward and backward on small CPU tensors, with every option that leads to
another launch configuration; only the launches are recorded. Sizes are as divisible by 16 as those
of real models.

    python -m bench._compile.kernel_cases gelu 90      # one case on one architecture, at once

Most cases are compiled for one GPU of each class of the launch tables. ``gpt2``, a training step at
GPT-2's sizes, repeats theirs for the other GPUs that people own.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench._compile.static import case_main
from fastgpt import GPT, GPTConfig
from fastgpt.kernels import fused


def _gpt2() -> None:
    """Float32 weights under autocast to both 16-bit dtypes, keeping activations and recomputing
    them, with dropout and without."""
    idx = torch.zeros(1, 64, dtype=torch.int64)
    for dropout, recompute in ((0.0, False), (0.1, True)):
        config = GPTConfig(block_size=64, n_layer=1, dropout=dropout)
        model = GPT(config, ops=fused, recompute=recompute)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                loss = model(idx, idx)[1]
            loss.backward()


CASES: dict[str, Callable[[], object]] = {"gpt2": _gpt2}
OTHER_GPUS = ("gpt2", "adamw", "attention_decode")  # cases that are compiled for those too
LEAST_CAPABILITY: dict[str, int] = {}  # of cases that older architectures cannot run
for path in sorted(Path(__file__).parents[1].glob("bench_*.py")):
    module = importlib.import_module(f"bench.{path.stem}")
    CASES |= getattr(module, "COMPILED", {})
    LEAST_CAPABILITY |= getattr(module, "LEAST_CAPABILITY", {})

if __name__ == "__main__":
    sys.exit(case_main(CASES))
