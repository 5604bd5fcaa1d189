"""``init_from`` a path to pretrained weights, checked against the data's tokens; document mask."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from fastgpt import GPT
from fastgpt.data.prepare import prepare
from fastgpt.data.sources import TextSource, source_of
from fastgpt.interop.export import ExportConfig, export
from fastgpt.tokenizer import Tokenizer
from fastgpt.tokenizer.training import train_tokenizer
from fastgpt.training.init_from import eot_token
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import TEXT, data_set, quiet, small_config, trained

pytest.importorskip("safetensors", reason="the extra hf")
pytest.importorskip("tokenizers", reason="the extra data")


def exported(root: Path, to: str) -> str:
    return str(export(ExportConfig(to=to, out_dir=str(root / "out"))).path)  # type: ignore[arg-type]


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_weights_from_a_path(tmp_path: Path, to: str) -> None:
    data_set(tmp_path)
    first = trained(tmp_path, always_save_checkpoint=True, bias=True)
    path = exported(tmp_path, to)
    trainer = Trainer(small_config(tmp_path, init_from=path, n_layer=9, dropout=0.3), quiet())
    assert trainer.config.n_layer == 2 and trainer.iter_num == 0
    assert trainer.model.config.dropout == 0.3
    for name, value in first.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value)
    with pytest.raises(ValueError, match="block_size must be at most 16 with init_from=.*, got 17"):
        Trainer(small_config(tmp_path, init_from=path, block_size=17), quiet())


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    data_set(tmp_path)
    trained(tmp_path, bias=True)
    path = exported(tmp_path, "safetensors")
    data_set(tmp_path, TEXT + "more characters")
    with pytest.raises(ValueError, match="has a vocabulary of .* but the data set .*small has"):
        Trainer(small_config(tmp_path, init_from=path), quiet())
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        Trainer(small_config(tmp_path, init_from=str(tmp_path / "absent.safetensors")), quiet())


DOCUMENTS = [f"Document {n}: {n} times {n} is {n * n}." for n in range(200)]


def documents(root: Path, tokenizer: Tokenizer) -> None:
    """Write a data set of documents to ``root/small``."""
    folder = root / "texts"
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(DOCUMENTS):
        (folder / f"{number:03d}.txt").write_text(text)
    prepare(source_of(folder), tokenizer, root / "small", val_share=0.2)


@pytest.fixture
def bpe(tmp_path: Path) -> Tokenizer:
    return train_tokenizer(TextSource("\n".join(DOCUMENTS)), "bpe", 300, tmp_path / "bpe")


def test_subword_tokens_are_compared_by_what_they_mean(tmp_path: Path, bpe: Tokenizer) -> None:
    documents(tmp_path, bpe)
    trained(tmp_path, bias=True)
    path = Path(exported(tmp_path, "hf"))
    config = small_config(tmp_path, init_from=str(path))
    file = path / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    file.write_text(json.dumps(vocabulary, indent=3))  # different bytes, same tokens
    assert Trainer(config, quiet()).model.config.vocab_size == 320  # 300, padded
    model = vocabulary["model"]["vocab"]
    model["A"], model["B"] = model["B"], model["A"]
    file.write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match=f"they differ from id {min(model['A'], model['B'])} on"):
        Trainer(config, quiet())


def test_the_separator_of_the_documents(tmp_path: Path, bpe: Tokenizer) -> None:
    documents(tmp_path, bpe)
    config = small_config(tmp_path, document_mask=True)
    assert eot_token(small_config(tmp_path), bpe) is None
    assert eot_token(config, bpe) == bpe.end_of_text
    (tmp_path / "small" / "manifest.json").unlink()
    assert eot_token(config, bpe) == bpe.end_of_text
    assert eot_token(config, None) == 50256  # data prepared by nanoGPT


def test_documents_are_packed(tmp_path: Path, bpe: Tokenizer) -> None:
    """A batch's loss equals that of its documents one by one, also after resuming."""
    documents(tmp_path, bpe)
    keys = dict(document_mask=True, dropout=0.0, gradient_accumulation_steps=1, max_iters=3)
    trained(tmp_path, **keys)
    trainer = Trainer(small_config(tmp_path, **keys, init_from="resume"), quiet())
    assert trainer.iter_num == 4
    assert isinstance(trainer.model, GPT) and trainer.model.eot_token == bpe.end_of_text
    alone, total, count = trainer.model, torch.zeros(()), 0
    x, y = trainer.batches.next("train")
    opening = bpe.end_of_text
    assert opening is not None and opening in x[:, 1:]
    packed = alone(x, y)[1].item()
    alone.eot_token = None
    for row, targets in zip(x, y, strict=True):
        borders = [i for i in range(1, len(row)) if row[i] == opening]
        for start, stop in itertools.pairwise([0, *borders, len(row)]):
            loss = alone(row[None, start:stop], targets[None, start:stop])[1]
            total, count = total + loss.item() * (stop - start), count + stop - start
    assert packed == pytest.approx(total.item() / count, abs=1e-5)
    assert packed != pytest.approx(alone(x, y)[1].item(), abs=1e-4)


def test_data_without_a_separator_cannot_be_packed(tmp_path: Path, bpe: Tokenizer) -> None:
    prepare(TextSource("\n".join(DOCUMENTS)), bpe, tmp_path / "small")
    with pytest.raises(ValueError, match="document_mask must be False .*small: it is one text"):
        Trainer(small_config(tmp_path, document_mask=True), quiet())
    data_set(tmp_path / "characters")
    with pytest.raises(ValueError, match="document_mask must .*: it consists of characters"):
        Trainer(small_config(tmp_path / "characters", document_mask=True), quiet())
