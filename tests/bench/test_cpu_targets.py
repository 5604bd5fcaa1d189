"""On a CPU, a step takes less memory than nanoGPT's in eager PyTorch. Speed is not tested: times
on a busy machine vary too much. ``python bench/run.py`` prints it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools.small_runs import HANGS

ROOT = Path(__file__).resolve().parents[2]

# Prints by how many bytes the resident memory of its process grows at most in the second step. The
# first, with few tokens, allocates what stays: weights and AdamW's moments.
PEAK_OF_A_STEP = """
import sys
from pathlib import Path

from bench._step import variants
import torch

from fastgpt import GPT, GPTConfig


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


torch.set_num_threads(1)
variant = variants.VARIANTS[sys.argv[1]]
model = GPT(GPTConfig(512, 50304, n_layer=2, n_head=2, n_embd=64), recompute=variant.recompute)
optimizer = variants.optimizer_of(model, variant, 1e-3)
for batch_size, length in ((1, 8), (4, 512)):
    idx = torch.randint(50304, (batch_size, length))
    before = resident("VmRSS")
    variant.loss(model, idx, idx).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(resident("VmHWM") - before)
"""


def peak_of_a_step(variant: str) -> int:
    child = subprocess.run(
        [sys.executable, "-c", PEAK_OF_A_STEP, variant],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=HANGS,
    )
    assert child.returncode == 0, child.stderr
    return int(child.stdout)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"
)
def test_a_step_with_gpt2s_vocabulary_takes_at_most_0_6_of_the_memory() -> None:
    eager = peak_of_a_step("sdpa")
    assert eager > 2048 * 50304 * 4  # the logits alone
    for variant in ("fastgpt", "fastgpt_recompute"):
        assert peak_of_a_step(variant) <= 0.6 * eager, variant
