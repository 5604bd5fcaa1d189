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


def read(folder: Path) -> Any:
    return json.loads((folder / "profile.json").read_text())


def test_the_time_of_a_step_by_kind_of_work(tmp_path: Path) -> None:
    options = replace(
        variants.CPU_OPTIONS, batch_size=2, block_size=16, n_layer=1, n_head=2, n_embd=16
    )
    if torch.cuda.is_available():
        options = replace(options, block_size=64, n_embd=64)
    assert profile.profile(tmp_path, options) == 0
    found = read(tmp_path)
    assert list(found["variants"]) == ["fastgpt_train", "fastgpt"]
    for data in found["variants"].values():
        kinds = data["kinds"]
        assert data["step_ms"] > 0 and data["kernels"]
        assert sum(kind["share"] for kind in kinds) == pytest.approx(1.0)
        assert sum(kind["ms"] for kind in kinds) == pytest.approx(data["kernels_ms"])
        assert {"attention", "matrix products", "optimizer"} <= {kind["kind"] for kind in kinds}


def test_a_variant_that_cannot_be_profiled_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def profiled(training: Any, device: Any) -> tuple[float, list[dict[str, Any]]]:
        if training._step is not None:
            raise RuntimeError("broken kernel\nand more")
        return 1.0, [{"name": "gelu", "calls": 1.0, "ms": 0.5}]

    monkeypatch.setattr(profile, "_profiled", profiled)
    options = replace(
        variants.CPU_OPTIONS, batch_size=2, block_size=16, n_layer=1, n_head=2, n_embd=16
    )
    assert profile.profile(tmp_path, options) == 1
    found = read(tmp_path)["variants"]
    assert found["fastgpt_train"] == {"failure": "RuntimeError: broken kernel"}
    assert found["fastgpt"]["step_ms"] == 1.0
    assert "and more" in capsys.readouterr().err


def test_shares_and_ratios_by_hand() -> None:
    kernels = [
        {"name": "nvjet_tst_128x128", "calls": 2.0, "ms": 6.0},
        {"name": "_attention_fwd_kernel", "calls": 1.0, "ms": 3.0},
        {"name": "Memcpy HtoD", "calls": 1.0, "ms": 1.0},
    ]
    data = profile.by_kind(kernels, {"matrix products": 4.0, "attention": 2.0, "optimizer": 1.0})
    kinds = {kind["kind"]: kind for kind in data["kinds"]}
    assert data["kernels_ms"] == 10.0 and data["floor_ms"] == 7.0
    assert kinds["matrix products"] == {"kind": "matrix products", "ms": 6.0, "share": 0.6,
                                        "floor_ms": 4.0, "ratio": 1.5}  # fmt: skip
    assert kinds["optimizer"]["ms"] == 0.0
    assert kinds["copies and sums"]["ratio"] is None
    assert [kernel["ms"] for kernel in data["kernels"]] == [6.0, 3.0, 1.0]


def test_the_floor_is_that_of_the_roofline_and_the_optimizer() -> None:
    ceilings = Ceilings("a GPU", 788.0, 4.3)
    options = variants.Options(batch_size=2, block_size=64)
    config = GPTConfig(block_size=64, vocab_size=96, n_layer=2, n_head=2, n_embd=32)
    kinds = profile.floor_by_kind(config, options, ceilings)
    n_parameters = sum(p.numel() for p in GPT(config).parameters())
    assert kinds["optimizer"] == pytest.approx(28 * n_parameters / 4.3e9)
    rows = floor(config, 2, 64, ceilings)
    assert sum(kinds.values()) == pytest.approx(sum(r.ms for r in rows) + kinds["optimizer"])


def test_every_kernel_of_ours_is_of_a_kind() -> None:
    names = {
        node.name
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    kinds = {name: profile.kind_of_kernel(name) for name in names}
    assert not {name for name, kind in kinds.items() if kind == "copies and sums"}
    assert kinds["_linear_gelu_kernel"] == "matrix products"
    assert kinds["_attention_bwd_dq_kernel"] == "attention"
    assert kinds["_cross_entropy_rows_kernel"] == "loss"
    assert kinds["_weight_grad_kernel"] == "matrix products"
