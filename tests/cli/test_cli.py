"""The commands: files written, output, exit codes."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.cli import main as cli
from fastgpt.training.config import TrainConfig
from fastgpt.training.distributed import World
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import TEXT, arguments, data_set, small_keys, state_of


def small(**changes: Any) -> list[str]:
    return ["train", "--preset=gpt2", *arguments(small_keys(Path(), **changes))]


def test_all_processes_take_the_keys_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """out_dir = 'out-' + str(time.time()) would give each process a different folder."""

    def gathered(self: World, item: Any) -> list[Any]:
        first = replace(item, out_dir="first") if isinstance(item, TrainConfig) else item
        return [first, item]

    data_set(Path())
    monkeypatch.setattr(World, "all_gather_object", gathered)
    assert cli.main(small(out_dir="second")) == 0
    assert Path("first/ckpt.pt").exists() and not Path("second").exists()


@pytest.mark.parametrize("of_nanogpt", [False, True])
def test_resume_without_the_dtype_of_the_checkpoint(
    of_nanogpt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set(Path())
    assert cli.main(small(max_iters=10, n_layer=1)) == 0
    state = state_of(Path())
    state["config"]["dtype"] = "float16"  # trained on a GPU
    if of_nanogpt:
        del state["fastgpt"]
    torch.save(state, "out/iter-0000011.pt")
    resume = ["train", "--init_from=resume", "--max_iters=11"]
    capsys.readouterr()
    assert cli.main(resume) == 0
    said = "dtype = auto, since cpu does not support the checkpoint's float16"
    assert capsys.readouterr().out.count(said) == 1
    assert cli.main([*resume, "--max_iters=12"]) == 0  # the new checkpoint has dtype auto
    assert said not in capsys.readouterr().out
    for form in (["--dtype=float16"], ["--dtype", "float16"]):
        assert cli.main([*resume, *form]) == 2
        assert "dtype must be auto, float32 or bfloat16 on cpu" in capsys.readouterr().err
    Path("own.py").write_text("dtype = 'float16'")  # set explicitly, although in a file
    assert cli.main(["train", "own.py", *small()[1:], "--init_from=resume"]) == 2
    assert "dtype must be auto, float32 or bfloat16 on cpu" in capsys.readouterr().err


def test_prepare_train_sample(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.txt").write_text(TEXT)
    assert cli.main(["prepare", "--input", "own.txt"]) == 0
    out = capsys.readouterr().out
    assert "prepared data/own: characters, vocabulary of 18, 8,388 tokens for training" in out
    assert "train on it: fastgpt train --dataset=own" in out

    assert cli.main(small(data_root="data", dataset="own")) == 0
    out = capsys.readouterr().out
    assert "keys that differ from the defaults: " in out and "dataset=own" in out
    assert "step 20: train loss" in out
    assert "bigram, counted on train.bin" in out and "bigram entropy of val.bin" in out
    sample, saved, last = out[out.index(" sample ") :].partition("\n")[2].rpartition("saved ")
    assert saved + last == "saved out/ckpt.pt. Generate text with it: fastgpt sample\n"
    assert len(sample) > 300 and set(sample) <= set(TEXT)

    assert cli.main(["sample", "--num_samples=2", "--max_new_tokens=30", "--start=12"]) == 0
    samples = capsys.readouterr().out
    assert samples.count("12") >= 2 and len(samples) > 60


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_that_cannot_show_the_text(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters that the terminal cannot encode are escaped; printing never fails a command."""
    Path("na\u00efve \u2603.txt").write_text(
        "na\u00efve caf\u00e9 \U0001f600\n" * 200, encoding="utf-8"
    )

    def printed(*argv: str) -> str:
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            assert cli.main([*argv]) == 0
            out.flush()
        return out.buffer.getvalue().decode(encoding)

    name = "na\u00efve \u2603"
    assert r"\u2603" in printed("prepare", "--input", f"{name}.txt")
    text = printed(*small(data_root="data", dataset=name, max_iters=2, n_layer=1))
    assert "step 3" in text and r"\U0001f600" in text[text.index(" sample ") :]
    sample = ["sample", "--num_samples=2", "--max_new_tokens=60", "--start=\u00e9 \U0001f600"]
    assert r"\U0001f600" in printed(*sample)
    rows = [json.loads(line) for line in printed(*sample, "--json").splitlines()]
    assert [row["prompt"] for row in rows] == ["\u00e9 \U0001f600"] * 2
    errors = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr("sys.stderr", errors)
    assert cli.main(["prepare", "--input=absent \u2603"]) == 2


def test_a_run_stopped_before_its_first_evaluation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a ckpt.pt sample and export use the newest iter-*.pt, and say so."""
    data_set(Path())
    monkeypatch.setattr(World, "any", lambda self, value: True)  # stops after the first update
    assert cli.main(small(eval_interval=1000)) == 130
    assert not Path("out/ckpt.pt").exists()
    out = " ".join(capsys.readouterr().out.split())
    assert "stopped before iteration 1; saved out/iter-0000001.pt" in out
    assert "--init_from=resume" in out
    assert cli.main(["sample", "--num_samples=1", "--max_new_tokens=5", "--start=1"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("note: out has no ckpt.pt")
    assert captured.err.endswith("using out/iter-0000001.pt\n") and "using" not in captured.out
    assert cli.main(["export", "--to=nanogpt"]) == 0
    assert "note: out has no ckpt.pt" in capsys.readouterr().out
    assert torch.load("out/nanogpt/ckpt.pt")["iter_num"] == 1


def test_a_vocabulary_too_large_for_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = data_set(Path())
    for name in ("manifest.json", "meta.pkl"):  # nanoGPT's BPE data has neither
        (folder / name).unlink()

    def offline() -> None:
        raise ImportError("GPT-2's BPE needs tiktoken")

    monkeypatch.setattr("fastgpt.cli.train.GPT2Tokenizer", offline)
    assert cli.main(small(n_layer=1, max_iters=1)) == 0
    out = capsys.readouterr().out
    assert "No bigram table: 50304 x 50304 is too large." in out
    assert "no sample: GPT-2's BPE needs tiktoken" in out


def test_the_builtin_corpus_is_prepared_when_it_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(small(data_root="data", dataset="builtin", max_iters=2)) == 0
    assert "prepared data/builtin: " in capsys.readouterr().out
    assert cli.main(small(data_root="data", dataset="builtin", eval_only=True)) == 0
    out = capsys.readouterr().out
    assert "prepared" not in out and "bigram" not in out
    # also as several files
    shutil.rmtree("data")
    assert cli.main(["prepare", "--shard_tokens=1000000"]) == 0
    assert cli.main(small(data_root="data", dataset="builtin", eval_only=True)) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FloatingPointError("nan"), 1),
        (ConnectionError("offline"), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (OSError(28, "No space left on device", "out/x"), 1),
        (PermissionError(13, "Permission denied", "out"), 2),
        (ImportError("wandb"), 2),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a bug"), None),  # keeps its traceback
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(self: Trainer) -> None:
        raise error

    data_set(Path())
    monkeypatch.setattr(Trainer, "run", failing)
    if code is None:
        with pytest.raises(RuntimeError, match="a bug"):
            cli.main(small())
        return
    assert cli.main(small()) == code
    shown = str(error)
    if isinstance(error, OSError) and error.filename:
        shown = f"error: {error.strerror}: {error.filename}\n"
    assert shown in capsys.readouterr().err
