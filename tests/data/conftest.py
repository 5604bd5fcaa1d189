from pathlib import Path

import pytest

from fastgpt.data import prepare as module
from fastgpt.data import token_writer
from fastgpt.data.sources import FileSource
from fastgpt.tokenizer import CharTokenizer
from tests.data.test_prepare import DOCUMENTS, jsonl


@pytest.fixture
def source(tmp_path: Path) -> FileSource:
    return FileSource(jsonl(tmp_path / "documents.jsonl"))


@pytest.fixture
def tokenizer() -> CharTokenizer:
    return CharTokenizer.from_texts(["\n", *DOCUMENTS])


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BATCH", 300)
    monkeypatch.setattr(token_writer, "_SAVE_EVERY", 4)
