"""bench/_step/profile.py at sizes for a CPU: the time of a step by kernel and by kind of work."""

import ast
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench._roofline.ceilings import Ceilings, floor
from bench._step import profile, variants
from fastgpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"batch_size": 2, "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
if torch.cuda.is_available():
    SIZES |= {"block_size": 64, "n_embd": 64}
SMALL = replace(variants.CPU_OPTIONS, **SIZES)  # type: ignore[arg-type]


def test_the_time_of_a_step_by_kind_of_work(tmp_path: Path) -> None:
    assert profile.profile(tmp_path, SMALL) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert list(found["variants"]) == ["fastgpt_train", "fastgpt"]
    for data in found["variants"].values():
        kinds = data["kinds"]
        assert data["step_ms"] > 0 and data["kernels"]
        assert sum(kind["share"] for kind in kinds) == pytest.approx(1.0)
        assert {"attention", "matrix products", "optimizer"} <= {kind["kind"] for kind in kinds}


def test_a_variant_that_cannot_be_profiled_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def profiled(training: Any, device: Any) -> tuple[float, list[dict[str, Any]]]:
        if training._step is not None:
            raise RuntimeError("broken kernel\nand more")
        return 1.0, [{"name": "gelu", "calls": 1.0, "ms": 0.5}]

    monkeypatch.setattr(profile, "_profiled", profiled)
    assert profile.profile(tmp_path, SMALL) == 1
    found = json.loads((tmp_path / "profile.json").read_text())["variants"]
    assert found["fastgpt_train"] == {"failure": "RuntimeError: broken kernel"}
    assert found["fastgpt"]["step_ms"] == 1.0
    assert "and more" in capsys.readouterr().err


def test_shares_and_floor_by_hand() -> None:
    kernels = [
        {"name": "nvjet_tst_128x128", "calls": 2.0, "ms": 6.0},
        {"name": "_attention_fwd_kernel", "calls": 1.0, "ms": 3.0},
        {"name": "Memcpy HtoD", "calls": 1.0, "ms": 1.0},
    ]
    data = profile.by_kind(kernels, {"matrix products": 4.0, "attention": 2.0, "optimizer": 1.0})
    assert data["kernels_ms"] == 10.0 and data["floor_ms"] == 7.0
    assert [tuple(kind.values()) for kind in data["kinds"]] == [
        ("matrix products", 6.0, 0.6, 4.0),
        ("attention", 3.0, 0.3, 2.0),
        ("copies and sums", 1.0, 0.1, None),
        ("optimizer", 0.0, 0.0, 1.0),
    ]
    assert [kernel["ms"] for kernel in data["kernels"]] == [6.0, 3.0, 1.0]

    ceilings = Ceilings("a GPU", 788.0, 4.3)
    config = GPTConfig(block_size=64, vocab_size=96, n_layer=2, n_head=2, n_embd=32)
    options = variants.Options(batch_size=2, block_size=64)
    floor_ms = profile.floor_by_kind(config, options, ceilings)
    n_parameters = sum(p.numel() for p in GPT(config).parameters())
    assert floor_ms["optimizer"] == pytest.approx(28 * n_parameters / 4.3e9)
    step = sum(row.ms for row in floor(config, 2, 64, ceilings))
    assert sum(floor_ms.values()) == pytest.approx(step + floor_ms["optimizer"])


def test_every_kernel_of_ours_is_of_a_kind() -> None:
    names = {
        node.name
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    kinds = {name: profile.kind_of_kernel(name) for name in names}
    assert not {name for name, kind in kinds.items() if kind == "copies and sums"}
