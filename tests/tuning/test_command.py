"""``fastgpt tune``: options, output table, entries for the launch tables."""

import functools

import pytest
import torch

from fastgpt import GPTConfig, tuning
from fastgpt.__main__ import main
from fastgpt.cli import tune as command
from fastgpt.cli.tune import TuneConfig, shape_of
from fastgpt.kernels import configs, fused
from fastgpt.kernels.configs import Elementwise, Key
from fastgpt.tuning import tuner


@pytest.fixture
def sm_90(measured: None, trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted kernels stand in for a GPU; the clock favours small AdamW blocks."""
    monkeypatch.setattr(command, "_gpu", lambda config: torch.device("cpu"))
    monkeypatch.setattr(tuning, "tune", functools.partial(tuner.tune, ops=fused))

    def milliseconds(work: object, device: torch.device) -> float:
        key = Key("adamw", "update", "sm_90", "float32")
        return 1.0 if configs.tuned(device).get(key) == Elementwise(512, 4) else 2.0

    monkeypatch.setattr(tuner, "milliseconds", milliseconds)
    tiny = GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=16)
    monkeypatch.setattr(command, "shape_of", lambda config: tiny)


def test_tune_and_export(sm_90: None, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tune", "--dtype=bfloat16", "--batch_size=1"]
    assert main([*argv, "--export"]) == 2
    assert "export must be False before anything was measured" in capsys.readouterr().err
    assert main([*argv, "--seconds=0"]) == 0
    assert "0 launches measured, 0 changed; " in capsys.readouterr().out
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "gemm weight 64" in out and "unchanged, of 6 tried" in out
    assert "adamw update" in out and "Elementwise(512, 4)" in out
    assert "1 changed" in out and "not decided" not in out
    assert main([*argv, "--export"]) == 0
    line = 'Key("adamw", "update", "sm_90", "float32"): Elementwise(BLOCK=512, num_warps=4),'
    assert capsys.readouterr().out == f"{line}  # 2.00 times as fast\n"


def test_a_gpu_that_fails_is_an_error(
    sm_90: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: object, **options: object) -> None:
        raise RuntimeError("the GPU failed with X")

    monkeypatch.setattr(tuning, "tune", failing)
    assert main(["tune", "--dtype=bfloat16"]) == 1
    assert "error: the GPU failed with X" in capsys.readouterr().out


def test_what_a_user_can_do_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device=cpu"]) == 2
    assert "device must be a GPU for the Triton kernels, got cpu" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["tune"]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert "device must be a GPU" in error and "device=cpu" not in error
    assert main(["tune", "--model=gpt3"]) == 2
    assert "model must be one of gpt2, " in capsys.readouterr().err


def test_float32_is_refused(sm_90: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--dtype=float32"]) == 2
    error = capsys.readouterr().err
    assert "dtype must be auto, bfloat16 or float16, got 'float32'" in " ".join(error.split())


def test_the_models() -> None:
    assert shape_of(TuneConfig(bias=True)) == GPTConfig()
    assert shape_of(TuneConfig(model="gpt2-xl", block_size=512, dropout=0.1)) == GPTConfig(
        n_layer=48, n_head=25, n_embd=1600, block_size=512, dropout=0.1, bias=False
    )
    assert shape_of(TuneConfig(model="char")) == GPTConfig(
        n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65, bias=False
    )
