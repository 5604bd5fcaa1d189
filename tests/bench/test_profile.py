"""bench/_step/profile.py at CPU sizes: time of a step by kernel."""

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
NAMES = "fastgpt_train", "fastgpt"
SMALL = replace(variants.CPU_OPTIONS, variants=NAMES, **SIZES)  # type: ignore[arg-type]


def test_the_time_of_a_step_by_kernel(tmp_path: Path) -> None:
    assert profile.profile(tmp_path, SMALL) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert tuple(found["variants"]) == NAMES
    for data in found["variants"].values():
        shares = [kernel["share"] for kernel in data["kernels"]]
        assert data["step_ms"] > 0 and sum(shares) == pytest.approx(1.0)
        assert shares == sorted(shares, reverse=True)
        names = " ".join(kernel["name"] for kernel in data["kernels"])
        assert "attention" in names and "adam" in names
        kinds = profile.by_kind(data["kernels"])
        assert sum(kinds.values()) == pytest.approx(data["kernels_ms"])
        assert all(kinds[kind] > 0 for kind in ("attention", "loss", "matrix products"))
    assert (tmp_path / "profile.png").stat().st_size > 10_000


def test_a_kernel_belongs_to_one_kind() -> None:
    of = {
        "_linear_gelu_bwd_kernel": "matrix products",
        "triton_poi_fused_gelu_3": "GELU",
        "triton_red_fused__log_softmax__to_copy_nll_loss_forward": "loss",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop": "attention",
        "cudnn::fusion::compute_dot_do_o_specialized<true, 64>": "attention",
        "cudnn::fusion::convert_dq_to_16bits<true>": "attention",
        "at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "AdamW and gradients",
        "triton_per_fused_add_native_layer_norm_7": "LayerNorm and residual",
        "triton_poi_fused__to_copy_0": "copies and sums",
    }
    for name, kind in of.items():
        found = profile.by_kind([{"name": name, "ms": 2.0}])
        assert [key for key, ms in found.items() if ms] == [kind], name


def test_a_variant_that_cannot_be_profiled_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def profiled(training: Any) -> dict[str, Any]:
        if training._step is not None:
            raise RuntimeError("broken kernel\nand more")
        return {"step_ms": 1.0, "kernels": []}

    monkeypatch.setattr(profile, "_profiled", profiled)
    assert profile.profile(tmp_path, SMALL) == 1
    found = json.loads((tmp_path / "profile.json").read_text())["variants"]
    expected = {"failure": "RuntimeError: broken kernel"}
    assert found == {"fastgpt_train": expected, "fastgpt": {"step_ms": 1.0, "kernels": []}}
    assert "and more" in capsys.readouterr().err
