"""bench/_step/profile.py at sizes for a CPU: the time of a step by kernel."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench._step import profile, variants

SIZES = {"batch_size": 2, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
if torch.cuda.is_available():
    SIZES |= {"block_size": 64, "n_embd": 64}
SMALL = replace(variants.CPU_OPTIONS, **SIZES)  # type: ignore[arg-type]


def test_the_time_of_a_step_by_kernel(tmp_path: Path) -> None:
    assert profile.profile(tmp_path, SMALL) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert list(found["variants"]) == ["fastgpt_train", "fastgpt"]
    for data in found["variants"].values():
        shares = [kernel["share"] for kernel in data["kernels"]]
        assert data["step_ms"] > 0 and sum(shares) == pytest.approx(1.0)
        assert shares == sorted(shares, reverse=True)
        names = " ".join(kernel["name"] for kernel in data["kernels"])
        assert "attention" in names and "adam" in names


def test_a_variant_that_cannot_be_profiled_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def profiled(training: Any) -> dict[str, Any]:
        if training._step is not None:
            raise RuntimeError("broken kernel\nand more")
        return {"step_ms": 1.0}

    monkeypatch.setattr(profile, "_profiled", profiled)
    assert profile.profile(tmp_path, SMALL) == 1
    found = json.loads((tmp_path / "profile.json").read_text())["variants"]
    expected = {"failure": "RuntimeError: broken kernel"}
    assert found == {"fastgpt_train": expected, "fastgpt": {"step_ms": 1.0}}
    assert "and more" in capsys.readouterr().err
