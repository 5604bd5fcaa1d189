"""Encoding and decoding, the format of ``meta.pkl``, rejected input."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgpt.tokenizer import MAX_VOCAB_SIZE, CharTokenizer, tokenizer_from

TEXT = "To be, or not to be?\r\n\tnaïve Ω 文 🙂 \ud800 \U0010ffff\0"


@pytest.fixture
def tokenizer() -> CharTokenizer:
    return CharTokenizer.from_texts([TEXT])


def test_ids_are_the_ranks_of_the_sorted_characters(tokenizer: CharTokenizer) -> None:
    characters = sorted(set(TEXT))
    assert tokenizer.itos == dict(enumerate(characters))
    assert tokenizer.stoi == {c: i for i, c in enumerate(characters)}
    assert tokenizer.vocab_size == len(characters)
    assert tokenizer.encode(TEXT) == [characters.index(c) for c in TEXT]
    assert CharTokenizer.from_texts(TEXT).itos == tokenizer.itos  # a string is an iterable of texts


def test_a_round_trip_changes_nothing(tokenizer: CharTokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert all(type(i) is int for i in ids)
    array = tokenizer.encode_array(TEXT)
    assert array.dtype == np.uint16 and array.tolist() == ids
    forms: list[Any] = [ids, tuple(ids), array, np.array(ids), torch.tensor(ids)]
    for form in forms:
        assert tokenizer.decode(form) == TEXT
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_encode_names_the_unknown_character() -> None:
    tokenizer = CharTokenizer.from_texts("abd")
    for unknown in ("c", "A", "z", "🙂"):  # between known characters, below, above, far above
        with pytest.raises(ValueError, match=f"'{unknown}' at position 2, .* 3 characters"):
            tokenizer.encode(f"ab{unknown}{unknown}")


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 3], ValueError, r"\[0, 3\), got 3 at position 1"),
        ([0, 1, -1], ValueError, r"\[0, 3\), got -1 at position 2"),
        ([2**40], ValueError, "got 1099511627776 at position 0"),
        ([0.0], TypeError, "integers, got float64"),
        (["a"], TypeError, "integers"),
        ([[0, 1]], ValueError, r"shape \(1, 2\)"),
        (1, ValueError, r"shape \(\)"),
    ],
)
def test_decode_refuses(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CharTokenizer.from_texts("abc").decode(ids)


@pytest.mark.parametrize(
    ("itos", "error", "message"),
    [
        ({}, ValueError, "1 to 65536 characters .* got 0"),
        ({0: "a", 2: "b"}, ValueError, "ids 0 to 1, got 2"),
        ({0: "a", -1: "b"}, ValueError, "ids 0 to 1, got -1"),
        ({0: "ab"}, ValueError, "single characters, got the entry 0: 'ab'"),
        ({0: ""}, ValueError, "single characters"),
        ({0: "a", 1: "b", 2: "a"}, ValueError, "distinct characters, got 'a'"),
        ({0: 7}, TypeError, "int to str, got the entry 0: 7"),
        ({"0": "a"}, TypeError, "int to str"),
    ],
)
def test_an_unusable_vocabulary_is_refused(itos: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CharTokenizer(itos)


def test_the_vocabulary_ends_where_uint16_does() -> None:
    text = "".join(map(chr, range(MAX_VOCAB_SIZE + 1)))
    tokenizer = CharTokenizer.from_texts([text[:-1]])
    assert tokenizer.decode(tokenizer.encode_array(text[:-1])) == text[:-1]
    with pytest.raises(ValueError, match="at most 65536 distinct characters .* got 65537"):
        CharTokenizer.from_texts([text])
    with pytest.raises(ValueError, match="the input is empty"):
        CharTokenizer.from_texts("")


def test_meta_pkl_is_the_documented_dict(tokenizer: CharTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    tokenizer.save(path)
    meta = pickle.loads(path.read_bytes())
    assert list(meta) == ["vocab_size", "itos", "stoi"]
    assert meta["vocab_size"] == len(meta["itos"]) == len(meta["stoi"]) == len(set(TEXT))
    assert all(meta["stoi"][char] == i for i, char in meta["itos"].items())
    loaded = tokenizer_from(tmp_path)
    assert isinstance(loaded, CharTokenizer) and loaded.itos == tokenizer.itos
    path.unlink()
    with pytest.raises(FileNotFoundError, match="meta.pkl"):
        CharTokenizer.load(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    itos = dict(enumerate("\n abc"))
    stoi = {c: i for i, c in itos.items()}
    path.write_bytes(pickle.dumps({"vocab_size": 5, "itos": itos, "stoi": stoi}, protocol))
    assert CharTokenizer.load(path).itos == itos


class _Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def _meta(**changes: Any) -> bytes:
    meta = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}} | changes
    return pickle.dumps({key: value for key, value in meta.items() if value is not None})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickle.dumps(_Malicious()), r"asks for (posix|nt)\.mkdir"),
        (_meta(extra=_Malicious()), r"asks for (posix|nt)\.mkdir"),
        (_meta(vocab_size=np.int64(2)), r"asks for numpy\."),
        (b"\x80\x02}r\xff\xff\xff\xff.", "memo entry 4294967295 at byte 3"),
        (b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".", "expected 1099511627776 bytes"),
        (b"", "not a usable meta.pkl: pickle exhausted"),
        (b"train.bin", "not a usable meta.pkl: "),
        (_meta()[:-5], "not a usable meta.pkl: "),
        (_meta(itos=["a", "b"]), "dicts, strings and ints only, but has EMPTY_LIST at byte"),
        (_meta(vocab_size=2.0), "but has BINFLOAT"),
        (_meta(vocab_size=True), "but has NEWTRUE"),
        (_meta(stoi=None), "stoi must be a dict, got nothing"),
        (_meta(itos="ab"), "itos must be a dict, got str"),
        (pickle.dumps(7), "must be a dict, got int"),
        (_meta(vocab_size=3), "vocab_size is 3, but itos has 2 entries"),
        (_meta(stoi={"a": 1, "b": 0}), "stoi is not the inverse of itos"),
        (_meta(itos={0: "a", 2: "b"}), "itos must have the ids 0 to 1, got 2"),
        (_meta(itos={0: "a", 1: 2}), "int to str"),
    ],
)
def test_a_foreign_or_damaged_meta_pkl_is_refused(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "meta.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as raised:
        CharTokenizer.load(path)
    assert str(path) in str(raised.value)
    assert not (tmp_path / "executed").exists()


def test_no_damage_to_meta_pkl_escapes(tmp_path: Path) -> None:
    """Three random bytes give a ValueError or a consistent vocabulary."""
    rng = random.Random(0)
    path = tmp_path / "meta.pkl"
    CharTokenizer.from_texts("\n abcdefgh").save(path)
    good = path.read_bytes()
    refused = 0
    for _ in range(500):
        damaged = bytearray(good)
        for _ in range(3):
            damaged[rng.randrange(len(good))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            tokenizer = CharTokenizer.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert tokenizer.stoi == {c: i for i, c in tokenizer.itos.items()}
    assert refused > 450
