import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import torch
from bench import host_time
from fastgpt.kernels import _host, fused

x = torch.full((4, 16), 3.0)
with host_time.no_launches():
    y = fused.gelu(x)
    forward, backward = host_time.step_ms(fused, n_layer=1, steps=1)
assert not torch.equal(y, torch.nn.functional.gelu(x)), "a kernel ran"
assert 0 < forward < float("inf") and 0 < backward < float("inf")
try:
    fused.gelu(x)
except ValueError as error:
    assert "CUDA device" in str(error)
else:
    raise AssertionError("CPU tensors are still taken")
"""


def test_a_step_without_launches():
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
