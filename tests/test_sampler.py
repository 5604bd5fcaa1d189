"""Text from checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import data_set, small_config

from fastgpt import GPT, GPTConfig
from fastgpt import checkpoint as ckpt
from fastgpt import sampler as sampling
from fastgpt.config import SampleConfig
from fastgpt.sampler import Sampler
from fastgpt.tokenizer import CharTokenizer
from fastgpt.trainer import Trainer


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that learnt the text more or less by heart."""
    root = tmp_path_factory.mktemp("run")
    data_set(root)
    trainer = Trainer(small_config(root, max_iters=200, lr_decay_iters=200, n_embd=32, dropout=0.0))
    trainer.run()
    return trainer.out_dir


def sampler(out_dir: Path, **changes: Any) -> Sampler:
    keys = {"num_samples": 3, "max_new_tokens": 20, "device": "cpu", **changes}
    return Sampler(SampleConfig(out_dir=str(out_dir), **keys))


def test_samples_begin_with_the_prompt_and_follow_the_seed(out_dir: Path) -> None:
    texts = list(sampler(out_dir, start="12 times "))
    assert len(texts) == 3
    assert all(text.startswith("12 times ") and len(text) == 29 for text in texts)
    assert len(set(texts)) > 1
    assert texts == list(sampler(out_dir, start="12 times "))
    assert texts != list(sampler(out_dir, start="12 times ", seed=5))


def test_temperature_zero_is_greedy(out_dir: Path) -> None:
    texts = list(sampler(out_dir, start="12 t", temperature=0.0, max_new_tokens=5))
    assert texts == ["12 times "] * 3
    assert texts == list(sampler(out_dir, start="12 t", top_k=1, max_new_tokens=5, seed=9))


def test_prompt_from_a_file(out_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("7 times")
    assert next(iter(sampler(out_dir, start=f"FILE:{path}"))).startswith("7 times")
    path.write_text("")
    with pytest.raises(ValueError, match="prompt.txt is empty"):
        sampler(out_dir, start=f"FILE:{path}")
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="prompt.txt is not UTF-8 text"):
        sampler(out_dir, start=f"FILE:{path}")
    with pytest.raises(FileNotFoundError, match="there is no file .*absent.txt"):
        sampler(out_dir, start=f"FILE:{tmp_path / 'absent.txt'}")


def test_unknown_characters_and_missing_runs_are_named(out_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'é' at position 1, which is not among the"):
        sampler(out_dir, start="1é")
    with pytest.raises(FileNotFoundError, match="no checkpoint .*ckpt.pt"):
        sampler(tmp_path)
    with pytest.raises(ValueError, match="device must be one that this machine has"):
        sampler(out_dir, device="cuda:99")


def test_the_characters_come_with_the_checkpoint(out_dir: Path, tmp_path: Path) -> None:
    """The data set may be gone, or made anew from another text."""
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "ckpt.pt"
    path.write_bytes((out_dir / "ckpt.pt").read_bytes())
    expected = list(sampler(out_dir))
    assert list(sampler(tmp_path / "out")) == expected
    saved = torch.load(path)
    saved["fastgpt"]["characters"] = saved["fastgpt"]["characters"][:-1]
    torch.save(saved, path)
    with pytest.raises(ValueError, match="has a vocabulary of .* tokens, but its data set has"):
        sampler(tmp_path / "out")


def test_dtype_and_compile(out_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(next(iter(sampler(out_dir, dtype="bfloat16")))) == 21
    compiled = []
    monkeypatch.setattr(GPT, "compile", lambda self: compiled.append(self))
    sampler(out_dir, compile=True)
    assert len(compiled) == 1


def test_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary padded beyond the tokenizer's, as GPT-2's is when trained from scratch."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 64, 1, 1, 8))
    tokenizer = CharTokenizer(dict(enumerate("\nabc")))
    asked = []

    def pretrained(name: str) -> GPT:
        asked.append(name)
        return model

    monkeypatch.setattr(GPT, "from_pretrained", pretrained)
    monkeypatch.setattr(sampling, "GPT2Tokenizer", lambda: tokenizer)
    config = SampleConfig(init_from="gpt2-xl", device="cpu", num_samples=1, max_new_tokens=400)
    (text,) = Sampler(config)
    assert asked == ["gpt2-xl"]
    assert text[0] == "\n" and 5 < len(text) < 200 and set(text) <= set("\nabc")


def test_a_bigram_writes_too(tmp_path: Path) -> None:
    data_set(tmp_path)
    Trainer(small_config(tmp_path, model="bigram")).run()
    saved = ckpt.load(tmp_path / "out" / "ckpt.pt")
    assert list(saved["model"]) == ["table.weight"]
    assert len(next(iter(sampler(tmp_path / "out")))) == 21
