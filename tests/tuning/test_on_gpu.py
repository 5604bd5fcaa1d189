"""The tuner on a GPU: compiled, checked and timed there."""

from pathlib import Path

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.kernels import configs
from fastgpt.tuning import Table, Workload, tune, tuner

SHAPE = GPTConfig(block_size=72, vocab_size=80, n_layer=1, n_head=1, n_embd=64)


def _loss() -> torch.Tensor:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model, idx = GPT(SHAPE), torch.randint(80, (2, 72))
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(idx, idx)[1]
    assert loss is not None
    loss.backward()
    return torch.stack(
        [loss.detach(), *(p.grad.norm() for p in model.parameters() if p.grad is not None)]
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate is right, if the GPU is large enough for it; so is the model then."""
    monkeypatch.setenv("FASTGPT_TUNED", str(tmp_path))
    monkeypatch.setattr(configs, "_TUNED", {None: {}})
    monkeypatch.setattr(tuner, "ROUNDS", 2)
    before, device = _loss(), torch.device("cuda", torch.cuda.current_device())
    table, left = tune(Workload(SHAPE, 2), device, seconds=600)
    assert left == 0 and len(table.lines) > 10
    assert all(why.startswith("OutOfResources") for _, _, why in table.rejected), table.rejected
    assert all(line.ms > 0 and line.present_ms > 0 for line in table.lines.values())
    assert Table.read(device) == table
    assert configs.tuned(device) == {key: line.config for key, line in table.lines.items()}
    torch.testing.assert_close(_loss(), before, rtol=0.02, atol=1e-3)
