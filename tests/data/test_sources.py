"""Reading texts from files: rejected input, splitting of long documents, assignment to splits."""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt.data import file_formats, sources
from fastgpt.data.prepare import prepare
from fastgpt.data.sources import DatasetSource, FileSource, TextSource, source_of
from fastgpt.tokenizer import CharTokenizer
from tests.data.test_prepare import DOCUMENTS


def test_the_seed_and_the_share_choose_the_documents(source: FileSource) -> None:
    def chosen(share: float, seed: int) -> set[int]:
        splits = [piece.split for piece in source.pieces(share, seed)]
        return {i for i, split in enumerate(splits) if split == "val"}

    assert chosen(0.3, 1) == chosen(0.3, 1) != chosen(0.3, 2)
    assert chosen(0.1, 1) < chosen(0.3, 1) < chosen(0.9, 1)
    many = sum(sources._uniform(0, i) < 0.1 for i in range(20000))
    assert 1850 < many < 2150  # 3.5 standard deviations


def test_inputs_without_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the input .*nowhere does not exist"):
        source_of(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder is a folder without files"):
        source_of(tmp_path / "folder")
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match="the input is empty"):
            prepare(source_of(tmp_path / name), CharTokenizer.from_texts("\n"), tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"line 2 of the input .*a\.jsonl is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"line 1 of the input .*a\.jsonl is not JSON"),
        ("a.jsonl", b'\n["text"]\n', r"line 2 .* must be a JSON object, got list"),
        ("a.jsonl", b'{"body": "a", "id": 1}', r"line 1 .* has no 'text', but 'body', 'id'; name"),
        ("a.jsonl", b'{"text": null}', r"line 1 .* must have a text as 'text', got NoneType"),
        ("a.jsonl", b'{"text": "\xff"}', r"line 1 .* is not JSON"),
        ("a.txt", b"caf\xc3\xa9 caf\xe9 au", r"a\.txt is not UTF-8: byte 0xe9 at position 9"),
        ("a.txt", b"caf\xc3", r"is not UTF-8: byte 0xc3 at position 3 \(unexpected end"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz is damaged: Not a gzipped file"),
        (
            "a.txt.gz",
            gzip.compress(b"text" * 99, mtime=0)[:-9],
            r"a\.txt\.gz is damaged: .* ended before",
        ),
        ("a.txt.zst", b"no zstd", r"a\.txt\.zst is damaged: "),
        ("a.parquet", b"no parquet", r"a\.parquet is damaged: "),
    ],
)
@pytest.mark.parametrize("chunk", [1 << 20, 3])
def test_damaged_inputs_are_named(
    chunk: int,
    name: str,
    data: bytes,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra [data]")
    monkeypatch.setattr(file_formats, "_CHUNK", 16 * chunk if name.endswith(".zst") else chunk)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        list(source_of(tmp_path / name).pieces(0.1, 0))


def test_endings_in_capitals_and_lone_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "A.JSONL.GZ"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "a\\ud800b \\ud83d\\ude42"}\n'))
    assert list(source_of(path).texts()) == ["one", "a\ufffdb 🙂"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl", "a.txt.gz"])
def test_a_byte_order_mark_is_no_part_of_a_text(name: str, tmp_path: Path) -> None:
    """Like a prompt's. Anywhere but at the start it is an ordinary character."""
    text = "one\r\ntwo\ufeff"
    rows = "json" in name
    data = (json.dumps({"text": text}) if rows else text).encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert "".join(source_of(tmp_path / name).texts()) == text
    if not rows:  # positions of invalid bytes count the mark
        (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfa\xff")
        with pytest.raises(ValueError, match="byte 0xff at position 4"):
            list(source_of(tmp_path / "b.txt").texts())
        (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf")
        assert list(source_of(tmp_path / "b.txt").texts()) == []


def test_a_zst_with_a_long_window_and_frames_to_be_skipped(tmp_path: Path) -> None:
    """Files of ``zstd --long=30`` (long window) and ``pzstd`` (skippable frames)."""
    zstandard = pytest.importorskip("zstandard", reason="needs the extra [data]")
    options = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()
    data = compressor.compress(b"of unknown length") + compressor.flush()
    skipped = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"none"
    (tmp_path / "a.txt.zst").write_bytes(skipped + data + skipped + data)
    assert "".join(source_of(tmp_path / "a.txt.zst").texts()) == 2 * "of unknown length"
    (tmp_path / "a.txt.zst").write_bytes(data[:-3])
    with pytest.raises(ValueError, match=r"a\.txt\.zst is damaged: it ends within its last frame"):
        list(source_of(tmp_path / "a.txt.zst").texts())


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_a_parquet_that_is_damaged_inside(compression: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [data]")
    import pyarrow

    path = tmp_path / "a.parquet"
    texts = pyarrow.table({"text": [f"{i} text " * 50 for i in range(500)]})
    parquet.write_table(texts, path, compression=compression)
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 200] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"the input .*a\.parquet is damaged: "):
        list(source_of(path).texts())


def test_a_parquet_without_the_column(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [data]")
    import pyarrow

    parquet.write_table(pyarrow.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column 'text', but the columns body, id; name one"):
        list(source_of(tmp_path / "a.parquet").texts())
    with pytest.raises(ValueError, match="row 1 of .* must have a text as 'id', got int"):
        list(source_of(tmp_path / "a.parquet", "id").texts())


def test_a_data_set_that_is_a_program_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra [data]")
    (tmp_path / f"{tmp_path.name}.py").write_text("print('never run')\n")
    with pytest.raises(ValueError, match=r"the data set .*: Dataset scripts are no longer"):
        DatasetSource(str(tmp_path))


# ---- long documents


def pieces_of(text: str, monkeypatch: pytest.MonkeyPatch, length: int) -> list[str]:
    monkeypatch.setattr(sources, "PIECE", length)
    return list(TextSource(text).texts())


def test_pieces_end_where_a_bpe_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers", reason="needs the extra [data]")
    from tokenizers.pre_tokenizers import ByteLevel

    words = ByteLevel(add_prefix_space=False)
    text = Path(__file__).read_text() + " \n".join(DOCUMENTS)
    whole = [word for word, _ in words.pre_tokenize_str(text)]
    for length in (1000, 3000):
        pieces = pieces_of(text, monkeypatch, length)
        assert "".join(pieces) == text and max(map(len, pieces)) <= length
        assert len(pieces) < 2.2 * len(text) / length + 2
        cut = [word for piece in pieces for word, _ in words.pre_tokenize_str(piece)]
        assert cut == whole


def test_text_without_a_good_place_is_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = pieces_of("x" * 95 + "\n\n" + "  " * 50, monkeypatch, 10)
    assert "".join(pieces) == "x" * 95 + "\n\n" + "  " * 50
    assert {len(piece) for piece in pieces[:-1]} == {10}


def test_a_long_document_stays_in_one_split(
    source: FileSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", 40)
    pieces = list(source.pieces(0.5, 0))
    assert len(pieces) > 2 * len(DOCUMENTS)
    documents: list[tuple[str, set[str]]] = []
    parts: Iterator[sources.Piece] = iter(pieces)
    for piece in parts:
        text, splits = piece.text, {piece.split}
        while not piece.ends_document:
            piece = next(parts)
            text, splits = text + piece.text, splits | {piece.split}
        documents.append((text, splits))
    assert [text for text, _ in documents] == DOCUMENTS
    assert all(len(splits) == 1 for _, splits in documents)
    fractions = [piece.fraction or 0.0 for piece in pieces]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


@pytest.mark.parametrize("name", ["x.ndjson", "x.json", "x.jsonl.txt", "X.NDJSON.gz", "x.json.gz"])
def test_json_lines_under_other_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = b'\n{"text": "one"}\n{"text": "two"}\n'
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    source = source_of(path)
    assert isinstance(source, FileSource) and list(source.texts()) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.json", '{\n "text": "one"\n}\n'),
        ("x.json", "[1]"),
        ("x.jsonl.txt", "one"),
        ("x.json", ""),
    ],
)
def test_other_json_is_text(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    source = source_of(tmp_path / name)
    assert isinstance(source, TextSource) and "".join(source.texts()) == text
