"""GPT-2's BPE from files, tokenizer.json and SentencePiece, on small tokenizers trained here."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt.data.sources import TextSource
from fastgpt.tokenizer import (
    END_OF_TEXT,
    CharTokenizer,
    GPT2Tokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    packed,
    saved_tokenizer,
    tokenizer_from,
    unpacked,
)
from fastgpt.tokenizer.subword import byte_of_character
from fastgpt.tokenizer.training import train_tokenizer

for library in ("tiktoken", "tokenizers", "sentencepiece"):
    pytest.importorskip(library, reason="needs the extra [data]")

TEXT = Path(__file__).read_text() + "\n the cat's naïve café \t\r\n  \n42 ... " * 9
OTHER = "  Ωmega 文\n\n\t🙂 don't\u00a0STOP   \r\n x" + TEXT[500:900]
KINDS = ["gpt2", "json", "sentencepiece"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``json/tokenizer.json``, ``sentencepiece/tokenizer.model``, and the vocabulary of the first
    in GPT-2's three forms: ``gpt2``, ``huggingface`` and ``gpt2.tiktoken``."""
    root = tmp_path_factory.mktemp("tokenizers")
    train_tokenizer(TextSource(TEXT), "bpe", 400, root / "json")
    train_tokenizer(TextSource(TEXT), "unigram", 500, root / "sentencepiece")
    model = json.loads((root / "json" / "tokenizer.json").read_text())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokens = [*byte_of_character(), *map("".join, merges), END_OF_TEXT]
    lines = [f"{left} {right}\n" for left, right in merges]
    for name, ids, merged in (
        ("gpt2", "encoder.json", "vocab.bpe"),
        ("huggingface", "vocab.json", "merges.txt"),
    ):
        (root / name).mkdir()
        vocabulary = {token: i for i, token in enumerate(tokens)}
        (root / name / ids).write_text(json.dumps(vocabulary))
        (root / name / merged).write_text("#version: 0.2\n" + "".join(lines), encoding="utf-8")
    GPT2Tokenizer(root / "gpt2").save(root / "gpt2.tiktoken")
    return root


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, folder: Path) -> Tokenizer:
    if request.param == "characters":
        return CharTokenizer.from_texts("cba")
    return tokenizer_from(folder / request.param)


def test_the_kinds(folder: Path) -> None:
    found = [tokenizer_from(folder / name) for name in KINDS]
    assert [(type(tokenizer), tokenizer.vocab_size) for tokenizer in found] == [
        (GPT2Tokenizer, 400),
        (JsonTokenizer, 400),
        (SentencePieceTokenizer, 500),
    ]
    assert tokenizer_from(folder / "json").padded_vocab_size == 448
    assert CharTokenizer.from_texts("abc").padded_vocab_size == 3


@pytest.mark.parametrize("text", [TEXT, OTHER, "", " ", "\n"])
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text and tokenizer.decode(np.array(ids, np.int64)) == text
    array = tokenizer.encode_array(text)
    assert array.dtype.kind == "u" and array.tolist() == ids
    assert len(ids) < 0.7 * len(TEXT) or text != TEXT


def test_half_of_a_character(tokenizer: Tokenizer) -> None:
    """A lone surrogate, as from JSON or a non-UTF-8 command line, becomes U+FFFD."""
    for encode in (tokenizer.encode, tokenizer.encode_array):
        assert list(encode("caf\udce9 ")) == list(encode("caf\ufffd "))


def test_gpt2s_ids_are_those_of_the_other_library(folder: Path) -> None:
    """tiktoken on vocab.bpe against tokenizers on the same merges; compares the tokens' text."""
    ours, theirs = tokenizer_from(folder / "gpt2"), tokenizer_from(folder / "json")
    for text in (TEXT, OTHER, "   a  \n\n b'll x's 1234 !!?"):
        pieces = [[t.decode([i]) for i in t.encode_array(text)] for t in (ours, theirs)]
        assert pieces[0] == pieces[1]
    assert base64.b64encode(b"a") in (folder / "gpt2.tiktoken").read_bytes()


def test_gpt2s_vocabulary_without_a_file_is_downloaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    stored = {"gpt2": GPT2Tokenizer(folder / "gpt2")._encoding}
    monkeypatch.setattr(tiktoken, "get_encoding", stored.__getitem__)
    downloaded = tokenizer_from("gpt2")
    assert downloaded.fingerprint == tokenizer_from(folder / "gpt2").fingerprint

    def offline(name: str) -> Any:
        raise OSError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ConnectionError, match="no route.*TIKTOKEN_CACHE_DIR"):
        tokenizer_from("gpt2")


def test_gpt2s_vocabulary_in_three_forms_is_one(folder: Path) -> None:
    names = ("gpt2", "huggingface", "gpt2.tiktoken")
    tokenizers = [tokenizer_from(folder / name) for name in names]
    assert len({t.fingerprint for t in tokenizers}) == 1
    assert len({tuple(t.encode(OTHER)) for t in tokenizers}) == 1
    assert tokenizers[0].end_of_text == 399


@pytest.mark.parametrize("kind", ["gpt2", "json"])
def test_special_tokens_mean_themselves_in_prompts_and_text_in_data(
    kind: str, folder: Path
) -> None:
    tokenizer = tokenizer_from(folder / kind)
    end = tokenizer.end_of_text
    assert end is not None
    prompt = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert prompt.count(end) == 1 and len(prompt) == 3
    assert tokenizer.decode(prompt) == f"a{END_OF_TEXT}b"
    data = tokenizer.encode_array(f"a{END_OF_TEXT}b")
    assert end not in data and tokenizer.decode(data) == f"a{END_OF_TEXT}b"


def test_a_saved_one_is_found_beside_the_data(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert saved_tokenizer(tmp_path) is None
    tokenizer.save(tmp_path / tokenizer.FILE)
    loaded = tokenizer_from(tmp_path)
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(OTHER) == tokenizer.encode(OTHER)
    assert loaded.end_of_text == tokenizer.end_of_text is not None
    CharTokenizer.from_texts("abc").save(tmp_path / "meta.pkl")
    with pytest.raises(ValueError, match=f"more than one tokenizer: meta.pkl, {tokenizer.FILE}"):
        tokenizer_from(tmp_path)


@pytest.mark.parametrize("tokenizer", [*KINDS, "characters"], indirect=True)
def test_a_checkpoint_carries_it(tokenizer: Tokenizer) -> None:
    file = io.BytesIO()
    torch.save({"other": 1, **packed(tokenizer)}, file)
    file.seek(0)
    entries = torch.load(file, weights_only=True)
    again = unpacked(entries)
    assert again is not None and again.fingerprint == tokenizer.fingerprint
    assert unpacked({"other": 1}) is None and packed(None) == {}
    if "characters" in entries:
        assert entries["characters"] == "abc"
        assert CharTokenizer.from_texts("abd").fingerprint != tokenizer.fingerprint
        return
    for damage in ({"tokenizer_file": "../x"}, {"tokenizer": "text"}):
        with pytest.raises(ValueError, match="the tokenizer is damaged"):
            unpacked(entries | damage)


def test_wrong_ids_are_refused(tokenizer: Tokenizer) -> None:
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match=rf"\[0, {size}\), got {size} at position 1"):
        tokenizer.decode([0, size])


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.json", b"{}", ValueError, "not a usable tokenizer.json"),
        ("x.json", b"\xff", ValueError, "not a usable tokenizer.json"),
        ("x.model", b"", ValueError, "not a usable SentencePiece model"),
        ("x.model", b"{}", ValueError, "not a usable SentencePiece model"),
        ("x.tiktoken", b"YQ== 0\nYg==\n", ValueError, "line 2 is b'Yg=='"),
        ("x.tiktoken", b"YQ== 0\nYg== x\n", ValueError, "line 2 is b'Yg== x'"),
        ("x.tiktoken", b"!! 0\n", ValueError, "line 1 is b'!! 0'"),
        ("x.tiktoken", b"YQ== 0\nYg== 2\n", ValueError, "2 tokens, whose ids are not 0 to 1"),
        ("x.tiktoken", b"YQ== 0\n", ValueError, "no token for the byte 0x00"),
        ("x.txt", b"", ValueError, "must be char, gpt2, a folder, or a file that ends in"),
    ],
)
def test_damaged_files_are_refused(
    name: str, content: bytes, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message) as raised:
        tokenizer_from(tmp_path / name)
    assert name in str(raised.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="char, gpt2 or a path, but there is no .*nowhere"):
        tokenizer_from(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no tokenizer: none of meta.pkl, gpt2.tik"):
        tokenizer_from(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither encoder.json with vocab.bpe nor vocab"):
        GPT2Tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no tokenizer file"):
        GPT2Tokenizer(tmp_path / "x.tiktoken")


def test_merges_out_of_order_are_refused(folder: Path, tmp_path: Path) -> None:
    ids = (folder / "gpt2" / "encoder.json").read_text()
    first, *lines = (folder / "gpt2" / "vocab.bpe").read_text(encoding="utf-8").splitlines()
    (tmp_path / "encoder.json").write_text(ids)
    (tmp_path / "vocab.bpe").write_text("\n".join([first, *lines[::-1]]), encoding="utf-8")
    with pytest.raises(ValueError, match="contradict each other"):
        GPT2Tokenizer(tmp_path)
    (tmp_path / "vocab.bpe").write_text("a b c\n")
    with pytest.raises(ValueError, match="no usable encoder.json and vocab.bpe"):
        GPT2Tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_reproducible_and_replaces_nothing(kind: str, tmp_path: Path) -> None:
    source = TextSource(TEXT)
    first = train_tokenizer(source, kind, 450, tmp_path / "a")
    assert first.vocab_size == 450 and first.end_of_text is not None
    again = train_tokenizer(source, kind, 450, tmp_path / "b")
    assert again.encode(OTHER) == first.encode(OTHER)
    with pytest.raises(FileExistsError, match=f"{first.FILE} exists and is not replaced"):
        train_tokenizer(source, kind, 450, tmp_path / "a")
    with pytest.raises(ValueError, match="the input is empty"):
        train_tokenizer(TextSource(""), kind, 450, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("kind", "vocab_size", "message"),
    [
        ("bpe", 256, "vocab_size must be at least 257, got 256"),
        ("wordpiece", 300, "kind must be one of .*got 'wordpiece'"),
        ("unigram", 10**6, "could not learn 1000000 tokens from this text"),
    ],
)
def test_what_cannot_be_trained(kind: Any, vocab_size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(TextSource(TEXT), kind, vocab_size, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file"):
        train_tokenizer(TextSource(TEXT), "bpe", 300, tmp_path / "file")
