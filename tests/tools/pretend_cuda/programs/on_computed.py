"""Runs of ``fastgpt train`` on the pretended device with interpreted kernels equal the CPU's.
Started by ``test_on_pretended_device.py``, with ``--interpret``.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import __main__ as cli
from tests.tools.pretend_cuda.programs.on_trainer import run
from tests.tools.small_runs import assert_same

pytestmark = pytest.mark.gpu
SHORT = dict(max_iters=4, lr_decay_iters=4, gradient_accumulation_steps=1)


def losses(state: dict[str, Any]) -> torch.Tensor:
    keys = ("loss", "train/loss", "val/loss")
    return torch.tensor([row[key] for row in state["log"] for key in keys if row[key] is not None])


def test_the_device_trains_as_the_cpu_does(tmp_path: Path) -> None:
    """In float32, up to the kernels' order of sums."""
    keys = dict(SHORT, dtype="float32", dropout=0.0)
    on_cpu = run(tmp_path / "cpu", device="cpu", **keys)
    on_device = run(tmp_path / "device", **keys)
    torch.testing.assert_close(losses(on_device), losses(on_cpu), rtol=0.0, atol=1e-4)
    assert losses(on_cpu)[-1] < losses(on_cpu)[0] - 0.02


def test_a_graph_changes_nothing(tmp_path: Path) -> None:
    graphed = run(tmp_path / "graph", dtype="bfloat16", **SHORT)
    plain = run(tmp_path / "plain", dtype="bfloat16", cuda_graph=False, **SHORT)
    assert_same(graphed, plain)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    major, minor = torch.cuda.get_device_capability()
    assert f"launch table of sm_{major}{minor}" in out
    assert "one update      agrees with the reference ops" in out
