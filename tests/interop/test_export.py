"""``fastgpt export``: the programs that the files are for can read them."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.__main__ import main
from fastgpt.interop import export as exporting
from fastgpt.interop.export import ExportConfig, Exported, export
from fastgpt.sampler import Sampler
from fastgpt.tokenizer import END_OF_TEXT, CharTokenizer, GPT2Tokenizer
from fastgpt.tokenizer.subword import byte_of_character
from fastgpt.training import checkpoint as ckpt
from fastgpt.training.config import SampleConfig
from fastgpt.training.trainer import Trainer
from tests.interop.test_from_pretrained import assert_same_logits, theirs
from tests.tools.small_runs import TEXT, assert_same, data_set, quiet, small_config, trained

safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs the extra hf")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

# Some tokens can be reached by several merges; one merge joins the bytes of a single letter.
_MERGES = ["t h", "th e", "Ġ the", "h e", "a n", "an d", "Ġ and", "Ã ©", "o r", "e r", "ĠĠ Ġ"]


def run(root: Path, **changes: Any) -> Trainer:
    data_set(root)
    return trained(root, **changes)


def exported(root: Path, to: Any, **keys: Any) -> Exported:
    return export(ExportConfig(to=to, out_dir=str(root / "out"), **keys))


def test_the_characters_become_a_tokenizer(tmp_path: Path) -> None:
    run(tmp_path, bias=True)
    written = exported(tmp_path, "hf")
    folder = written.path
    assert written == Exported(tmp_path / "out" / "hf", [])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    line = TEXT[:40]
    ids = tokenizer(line)["input_ids"]
    own = ckpt.own_tokenizer(ckpt.load(tmp_path / "out" / "ckpt.pt"))
    assert own is not None and ids == own.encode(line) and len(ids) == 40
    assert tokenizer.decode(ids) == line
    assert tokenizer.eos_token is None and tokenizer.model_max_length == 16
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    out = model.generate(torch.tensor([ids[:4]]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(out[0]).startswith(line[:4]) and out.shape == (1, 12)


def vocabulary(folder: Path) -> Path:
    """Write a vocabulary in GPT-2's format, two files."""
    folder.mkdir(parents=True)
    tokens = list(byte_of_character()) + [merge.replace(" ", "") for merge in _MERGES]
    assert "ĠĠ" not in tokens  # so the last merge never applies, but its token exists
    ids = {token: i for i, token in enumerate([*tokens, END_OF_TEXT])}
    (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *_MERGES]), encoding="utf-8")
    return folder


PROSE = "the other and  another   étude\n\nthen 12 andes, café's $5 <|endoftext|>the\t文🙂 "


def test_gpt2s_byte_pairs_become_a_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken", reason="needs the extra bpe")
    own = GPT2Tokenizer(vocabulary(tmp_path / "vocabulary"))
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, own.padded_vocab_size, 1, 2, 16))
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    own.save(data_dir / own.FILE)
    (tmp_path / "out").mkdir()
    state = {
        "model": model.state_dict(),
        "model_args": asdict(model.config),
        "config": {"data_root": str(tmp_path), "dataset": "data"},
    }
    torch.save(state, tmp_path / "out" / "ckpt.pt")
    written = exported(tmp_path, "hf")
    assert written.notes == []
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in written.path.iterdir()) == names
    tokenizer = transformers.AutoTokenizer.from_pretrained(written.path, local_files_only=True)
    ids = own.encode(PROSE)
    assert tokenizer(PROSE)["input_ids"] == ids
    assert len(ids) < len(PROSE.encode()) - 10 and own.end_of_text in ids  # merges applied
    assert tokenizer.decode(ids) == PROSE
    assert tokenizer.eos_token_id == own.end_of_text == 256 + len(_MERGES)
    config = transformers.AutoConfig.from_pretrained(written.path, local_files_only=True)
    assert config.eos_token_id == own.end_of_text


def test_a_tokenizer_json_goes_along(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
    json_form = tokenizers.Tokenizer(tokenizers.models.BPE())
    json_form.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    json_form.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=[END_OF_TEXT])
    json_form.train_from_iterator([TEXT], trainer)
    theirs(vocab_size=json_form.get_vocab_size()).save_pretrained(tmp_path / "theirs")
    json_form.save(str(tmp_path / "theirs" / "tokenizer.json"))
    written = exported(tmp_path, "hf", init_from=str(tmp_path / "theirs"))
    assert written.notes == []
    tokenizer = transformers.AutoTokenizer.from_pretrained(written.path, local_files_only=True)
    ids = tokenizer(TEXT[:99])["input_ids"]
    assert ids == json_form.encode(TEXT[:99]).ids and tokenizer.decode(ids) == TEXT[:99]
    assert tokenizer.eos_token == END_OF_TEXT


def test_a_tokenizer_that_is_missing_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs().save_pretrained(tmp_path / "theirs")
    source = str(tmp_path / "theirs")
    (note,) = exported(tmp_path, "hf", init_from=source).notes
    assert note == f"no tokenizer: there is none beside {source}"
    run(tmp_path, bias=True)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (note,) = exported(tmp_path, "hf", output=tmp_path / "other").notes
    assert note.startswith("no tokenizer: the exported tokenizer needs tokenizers: pip install ")


def test_safetensors_can_be_sampled(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "elsewhere" / "model.safetensors"
    assert exported(tmp_path, "safetensors", output=file).notes == []
    keys: dict[str, Any] = {"device": "cpu", "num_samples": 1, "start": "12", "max_new_tokens": 9}
    (text,) = Sampler(SampleConfig(init_from=str(file), **keys))
    assert [text] == list(Sampler(SampleConfig(out_dir=str(tmp_path / "out"), **keys)))
    # a second model with the same tokens, then one with different tokens
    assert exported(tmp_path, "safetensors", output=file.with_name("b.safetensors")).notes == []
    CharTokenizer.from_texts(["ab"]).save(file.with_name("meta.pkl"))
    (note,) = exported(tmp_path, "safetensors", output=file.with_name("c.safetensors")).notes
    assert note == f"no tokenizer: {file.parent} has another, meta.pkl"


def test_to_nanogpt(tmp_path: Path) -> None:
    """The checkpoint without our own key; ``test_checkpoint`` checks nanoGPT's format."""
    run(tmp_path, bias=True)
    written = exported(tmp_path, "nanogpt")
    assert written == Exported(tmp_path / "out" / "nanogpt", [])
    ours, theirs = (
        torch.load(folder / "ckpt.pt", weights_only=True)
        for folder in (tmp_path / "out", written.path)
    )
    del ours["fastgpt"]
    assert_same(theirs, ours)


def test_from_transformers_to_nanogpt_to_a_run_here(tmp_path: Path) -> None:
    data_dir = data_set(tmp_path)
    vocab_size = len(set(TEXT))
    published = theirs(vocab_size=vocab_size)
    published.save_pretrained(tmp_path / "theirs")
    written = exported(
        tmp_path, "nanogpt", init_from=str(tmp_path / "theirs"), output=tmp_path / "out"
    )
    (note,) = written.notes
    assert "tanh form of GELU" in note
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    keys = ["best_val_loss", "config", "iter_num", "model", "model_args", "optimizer"]
    assert sorted(saved) == keys
    assert saved["best_val_loss"].dim() == 0
    model = ckpt.build_model({**saved, "fastgpt": {"gelu": "tanh"}}, data_dir)
    assert isinstance(model, GPT)
    assert_same_logits(model, published)
    trainer = Trainer(small_config(tmp_path, init_from="resume", dropout=0.0), quiet())
    assert trainer.iter_num == 0 and trainer.model.config.n_embd == 32
    trainer.run()


def test_nothing_is_overwritten_and_nothing_left_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, bias=True)
    before = sorted(os.listdir(tmp_path / "out"))

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    for to, writer in (("hf", "write"), ("safetensors", "write_safetensors")):
        with monkeypatch.context() as patched:
            patched.setattr(exporting.huggingface, writer, full)
            with pytest.raises(OSError, match="No space left"):
                exported(tmp_path, to)
    assert sorted(os.listdir(tmp_path / "out")) == before
    with pytest.raises(FileExistsError, match="out exists; remove it, or name another"):
        exported(tmp_path, "hf", output=tmp_path / "out")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(tmp_path)
    assert main(["export", "--to=hf"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("wrote out/hf\nnote: the model has no biases; ")
    assert main(["export", "--to=nanogpt", "--init_from=out/hf", "--output=back"]) == 0
    assert capsys.readouterr().out == "wrote back\n"
    assert main(["export", "--to=hf"]) == 2
    assert "out/hf exists" in capsys.readouterr().err
    assert main(["export", "--to=gguf"]) == 2


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint .*ckpt.pt"):
        exported(tmp_path, "hf")
    run(tmp_path, model="bigram")
    for to in ("hf", "safetensors", "nanogpt"):
        with pytest.raises(ValueError, match="ckpt.pt holds a bigram: only a gpt can be exported"):
            exported(tmp_path, to)
    run(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for to in ("hf", "safetensors"):
        with pytest.raises(ImportError, match=r'safetensors: pip install -e "\.\[hf\]" in '):
            exported(tmp_path, to)
    assert not list((tmp_path / "out").glob("*hf*"))
