"""Preparing token files from texts: the same files from every input format, in memory that does not
grow with the input.
"""

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastgpt._files import sha256_of
from fastgpt.data import file_formats, sources
from fastgpt.data import prepare as module
from fastgpt.data.batches import Batches, token_files
from fastgpt.data.manifest import read_manifest
from fastgpt.data.prepare import characters_of, prepare
from fastgpt.data.sources import DatasetSource, FileSource, Source, TextSource, source_of
from fastgpt.tokenizer import CharTokenizer, Tokenizer, tokenizer_from

DOCUMENTS = [f"Document {i}\n" + "naïve Ω 文 🙂 and so on; " * (i % 7) + "." for i in range(60)]


class Wide(CharTokenizer):
    """A character tokenizer whose ids need 32 bits, with a separate end-of-text id."""

    OFFSET = 70_000

    def __init__(self, itos: dict[int, str]) -> None:
        super().__init__(itos)
        self.end_of_text = self.OFFSET - 1
        self.vocab_size = self.OFFSET + len(itos)

    def encode_array(self, text: str) -> npt.NDArray[Any]:
        return super().encode_array(text) + np.uint32(self.OFFSET)


def jsonl(path: Path, documents: list[str] = DOCUMENTS, key: str = "text") -> Path:
    lines = [json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(documents)]
    path.write_text("".join(lines) + "\n")
    return path


def ids_of(data_dir: Path, split: str) -> npt.NDArray[Any]:
    return np.concatenate([file.tokens for file in token_files(data_dir, split)])


def texts_of(data_dir: Path, tokenizer: Tokenizer) -> list[str]:
    """The texts of train and val."""
    return [tokenizer.decode(ids_of(data_dir, split)) for split in ("train", "val")]


def expected(source: Source, share: float, seed: int) -> list[str]:
    """Plain implementation: each document goes whole to its split, followed by a line feed."""
    texts = {"train": "", "val": ""}
    for piece in source.pieces(share, seed):
        texts[piece.split] += piece.text + ("\n" if piece.ends_document else "")
    return [texts["train"], texts["val"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_documents(source: FileSource, tokenizer: CharTokenizer, tmp_path: Path) -> None:
    out_dir = tmp_path / "new" / "data"
    manifest = prepare(source, tokenizer, out_dir, val_share=0.3, seed=5)
    train, val = texts_of(out_dir, tokenizer)
    assert [train, val] == expected(source, 0.3, 5)
    counts = {name: split.documents for name, split in manifest.splits.items()}
    assert sum(counts.values()) == len(DOCUMENTS) and 8 <= counts["val"] <= 28
    # every document appears once, whole and in order
    places = [[text.find(document + "\n") for text in (train, val)] for document in DOCUMENTS]
    assert all((a < 0) != (b < 0) for a, b in places)
    for places_in_split in zip(*places, strict=True):
        found = [place for place in places_in_split if place >= 0]
        assert found == sorted(found)
    assert sorted(contents(out_dir)) == ["manifest.json", "meta.pkl", "train.bin", "val.bin"]
    assert sorted(os.listdir(out_dir)) == sorted(contents(out_dir))  # no temporary files remain
    assert read_manifest(out_dir) == manifest and manifest.vocab_size == tokenizer.vocab_size
    assert tokenizer_from(out_dir).fingerprint == tokenizer.fingerprint
    for name, split in manifest.splits.items():
        (shard,) = split.shards
        path = out_dir / f"{name}.bin"
        assert (shard.file, shard.sha256) == (path.name, sha256_of(path))
        assert shard.tokens == split.tokens == path.stat().st_size // 2
        # as nanoGPT reads it
        assert np.array_equal(np.fromfile(path, dtype=np.uint16), ids_of(out_dir, name))


@pytest.mark.parametrize("form", ["gz", "zst", "parquet", "folder", "dataset", "mixed"])
def test_every_form_of_input_gives_the_same_tokens(
    form: str, source: FileSource, tokenizer: CharTokenizer, tmp_path: Path
) -> None:
    plain = tmp_path / "documents.jsonl"
    other: Source
    if form == "gz":
        path = tmp_path / "a.jsonl.gz"
        half = plain.read_bytes().index(b'{"id": 30')
        data = plain.read_bytes()
        path.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
        other = FileSource(path)
    elif form == "zst":
        zstandard = pytest.importorskip("zstandard", reason="needs the extra [data]")
        path, data = tmp_path / "a.jsonl.zst", plain.read_bytes()
        path.write_bytes(zstandard.compress(data[:999]) + zstandard.compress(data[999:]))
        other = FileSource(path)
    elif form == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [data]")
        import pyarrow

        table = pyarrow.table({"id": range(len(DOCUMENTS)), "content": DOCUMENTS})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
        other = FileSource(tmp_path / "a.parquet", text_key="content")
    elif form == "dataset":
        pytest.importorskip("datasets", reason="needs the extra [data]")
        (tmp_path / "local").mkdir()
        plain.rename(tmp_path / "local" / "train.jsonl")
        plain = jsonl(tmp_path / "documents.jsonl")
        other = DatasetSource(str(tmp_path / "local"))
    else:
        folder = tmp_path / "texts"
        for i, text in enumerate(DOCUMENTS):
            path = folder / f"{i // 10}" / f"{i:03d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            if i % 10 == 0 and form == "mixed":
                jsonl(path.with_suffix(".jsonl"), DOCUMENTS[i : i + 3])
            elif i % 10 > 2 or form == "folder":
                path.write_bytes(text.encode())
        (folder / ".hidden").write_text("not this")
        (folder / ".git").mkdir()
        (folder / ".git" / "config").write_text("nor this")
        other = source_of(folder)
    manifest = prepare(other, tokenizer, tmp_path / "other", val_share=0.3)
    same = prepare(FileSource(plain), tokenizer, tmp_path / "plain", val_share=0.3)
    assert manifest.splits == same.splits
    texts = texts_of(tmp_path / "other", tokenizer)
    assert texts == expected(FileSource(plain), 0.3, module.SEED)


@pytest.mark.parametrize("in_memory", [True, False])
def test_one_text_is_cut_at_its_end_and_gets_no_separator(in_memory: bool, tmp_path: Path) -> None:
    text = "\r\n".join(DOCUMENTS)
    path = tmp_path / "only" / "a.txt"
    path.parent.mkdir()
    path.write_text("\ufeff" + text, newline="")
    one = TextSource(text) if in_memory else source_of(path.parent)
    assert isinstance(one, TextSource)
    tokenizer = characters_of(one)
    assert tokenizer.itos == CharTokenizer.from_texts(text).itos
    prepare(one, tokenizer, tmp_path / "data")
    cut = int(0.9 * len(text))
    assert texts_of(tmp_path / "data", tokenizer) == [text[:cut], text[cut:]]


def test_the_shortest_text_is_usable(tmp_path: Path) -> None:
    one = TextSource("hello world")
    manifest = prepare(one, characters_of(one), tmp_path / "data")
    assert [split.tokens for split in manifest.splits.values()] == [9, 2]
    x, y = Batches(tmp_path / "data", 1, 1, "cpu", 0, manifest.vocab_size).next("val")
    assert x.shape == y.shape == (1, 1)
    for text, share in (("ten chars!", None), ("hello world", 0.1), ("long text", 0.9)):
        one = TextSource(text[:10])
        with pytest.raises(ValueError, match=rf"the text has {len(text[:10])} characters: with "):
            prepare(one, characters_of(one), tmp_path / "short", val_share=share)
    assert os.listdir(tmp_path / "short") == []


def test_characters_of_one_text_stay_one_file(
    source: FileSource, tokenizer: CharTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nanoGPT reads only train.bin."""
    monkeypatch.setattr(module, "SHARD_TOKENS", 97)
    one = TextSource("".join(DOCUMENTS))
    manifest = prepare(one, tokenizer, tmp_path / "text")
    assert [[shard.file for shard in split.shards] for split in manifest.splits.values()] == [
        ["train.bin"],
        ["val.bin"],
    ]
    documents = prepare(source, tokenizer, tmp_path / "documents", val_share=0.3)
    assert len(documents.splits["train"].shards) > 5


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shard_tokens", [1, 97, 10**6])
def test_shards_joined_are_the_whole(
    shard_tokens: int,
    workers: int,
    source: FileSource,
    tokenizer: CharTokenizer,
    tmp_path: Path,
    small_batches: None,
) -> None:
    if shard_tokens == 1:
        source = FileSource(jsonl(tmp_path / "few.jsonl", DOCUMENTS[:9]))
    manifest = prepare(
        source,
        tokenizer,
        tmp_path / "data",
        val_share=0.3,
        seed=3,
        shard_tokens=shard_tokens,
        workers=workers,
    )
    assert texts_of(tmp_path / "data", tokenizer) == expected(source, 0.3, 3)
    for split in manifest.splits.values():
        assert [s.tokens for s in split.shards[:-1]] == [shard_tokens] * (len(split.shards) - 1)
        assert 0 < split.shards[-1].tokens <= shard_tokens
    names = [shard.file for shard in manifest.splits["train"].shards]
    assert names[0] == ("train.bin" if shard_tokens == 10**6 else "train_000000.bin")
    manifest.verify(tmp_path / "data")


def test_large_vocabularies_get_32_bits(source: FileSource, tmp_path: Path) -> None:
    wide = Wide(dict(enumerate(sorted(set("".join(DOCUMENTS))))))
    manifest = prepare(source, wide, tmp_path / "data", val_share=0.3)
    assert manifest.dtype == "uint32"
    # nanoGPT would read a train.bin as uint16, so there must be none
    names = [split.shards[0].file for split in manifest.splits.values()]
    assert names == ["train_000000.bin", "val_000000.bin"]
    ids = ids_of(tmp_path / "data", "train")
    assert ids.dtype == np.uint32 and ids.max() >= Wide.OFFSET
    assert (ids == Wide.OFFSET - 1).sum() == manifest.splits["train"].documents
    x, y = Batches(tmp_path / "data", 4, 8, "cpu", 0, wide.vocab_size).next("train")
    assert int(x.max()) >= Wide.OFFSET and x[0, 1:].tolist() == y[0, :-1].tolist()
    with pytest.raises(ValueError, match="holds the token id 7"):
        Batches(tmp_path / "data", 4, 8, "cpu", 0, vocab_size=70_000)


def test_another_end_of_text(source: FileSource, tmp_path: Path) -> None:
    bare = CharTokenizer.from_texts([text.replace("\n", "") for text in ["#", *DOCUMENTS]])
    lines = FileSource(jsonl(tmp_path / "l.jsonl", [d.replace("\n", "") for d in DOCUMENTS]))
    with pytest.raises(ValueError, match="no token to end a document: name one with --end_of_text"):
        prepare(lines, bare, tmp_path / "data")
    with pytest.raises(ValueError, match=r"end_of_text must lie in \[0, \d+\), got 10000"):
        prepare(lines, bare, tmp_path / "data", end_of_text=10_000)
    prepare(lines, bare, tmp_path / "data", end_of_text=bare.stoi["#"], val_share=0.3)
    assert "".join(texts_of(tmp_path / "data", bare)).count("#") == len(DOCUMENTS)


# ---- memory


@pytest.mark.parametrize("form", ["jsonl", "text", "gz"])
def test_memory_does_not_grow_with_the_input(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BATCH", 1 << 12)
    monkeypatch.setattr(sources, "PIECE", 1 << 12)
    monkeypatch.setattr(file_formats, "_CHUNK", 1 << 12)
    rng = np.random.default_rng(0)
    words = rng.integers(97, 123, size=(400_000, 8), dtype=np.uint8)
    words[:, 7] = 32
    text = words.tobytes().decode()  # 3.2 MB
    lines = [text[i : i + 3200] for i in range(0, len(text), 3200)]
    tokenizer = CharTokenizer.from_texts("\n abcdefghijklmnopqrstuvwxyz")

    def peak(share: int) -> int:
        part = lines[:: 1000 // share] if share < 1000 else lines
        if form == "jsonl":
            source: Source = FileSource(jsonl(tmp_path / f"{share}.jsonl", part))
        else:
            path = tmp_path / (f"{share}.txt" if form == "text" else f"{share}.txt.gz")
            data = "\n".join(part).encode()
            path.write_bytes(data if form == "text" else gzip.compress(data, 1))
            source = TextSource(path)
        tracemalloc.start()
        characters_of(source)
        prepare(source, tokenizer, tmp_path / f"{form}{share}", val_share=0.1, workers=2)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return peak

    peak(10)  # imports, caches
    # Constant: a flag for each Unicode character, decompression, the batches in flight. The larger
    # input has 2.9 MB more of text and 5.8 MB more of tokens.
    assert peak(1000) < peak(100) + 200_000


# ---- rejected input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_share": 0.0}, "val_share must lie between 0 and 1, got 0.0"),
        ({"val_share": 1.0}, "val_share must lie between 0 and 1, got 1.0"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"val_share": 1e-9}, "val would be empty: all 60 documents are in train"),
        ({"val_share": 1 - 1e-9}, "train would be empty: all 60 documents are in val"),
    ],
)
def test_arguments_out_of_range(
    arguments: dict[str, Any],
    message: str,
    source: FileSource,
    tokenizer: CharTokenizer,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(source, tokenizer, tmp_path / "data", **arguments)
    # the error leaves nothing behind that prevents a second attempt
    prepare(source, tokenizer, tmp_path / "data", val_share=0.3)


def test_nothing_that_is_there_is_replaced(
    source: FileSource, tokenizer: CharTokenizer, tmp_path: Path
) -> None:
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(b"hours of BPE")
        with pytest.raises(FileExistsError, match=rf"{name} exists and is not replaced"):
            prepare(source, tokenizer, tmp_path, val_share=0.3)
        (tmp_path / name).unlink()
    CharTokenizer.from_texts("other").save(tmp_path / "meta.pkl")
    with pytest.raises(FileExistsError, match=r"meta\.pkl is another tokenizer"):
        prepare(source, tokenizer, tmp_path, val_share=0.3)
    tokenizer.save(tmp_path / "meta.pkl")
    prepare(source, tokenizer, tmp_path, val_share=0.3)
    with pytest.raises(NotADirectoryError, match="train.bin is a file"):
        prepare(source, tokenizer, tmp_path / "train.bin", val_share=0.3)


@pytest.mark.parametrize("form", ["folder", "jsonl"])
def test_few_documents_are_split_by_tokens(tmp_path: Path, form: str) -> None:
    """1% of three documents is less than one, so the end of all their text is for validation."""
    texts = ["a" * 1000, "b" * 491, "c" * 9]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    source = FileSource(folder if form == "folder" else tmp_path / "t.jsonl")
    tokenizer = characters_of(source)
    prepare(source, tokenizer, tmp_path / "data")

    def text_of(split: str) -> str:
        return tokenizer.decode(np.fromfile(tmp_path / "data" / f"{split}.bin", np.uint16))

    assert text_of("train") == f"{'a' * 1000}\n{'b' * 485}\n"
    assert text_of("val") == f"{'b' * 6}\n{'c' * 9}\n"
