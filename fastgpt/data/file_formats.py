"""Readers of text files, a few MB at a time: UTF-8, ``.jsonl``, Parquet; also ``.gz`` and ``.zst``.

Every reader yields (text, position), where position is the number of bytes of the file read so far.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgpt._files import parsed_json
from fastgpt._optional import optional
from fastgpt.tokenizer.base import in_utf8

_COMPRESSED = (".gz", ".zst")
_JSON_LINES = (".jsonl", ".ndjson")

_CHUNK = 1 << 20  # bytes
_ROWS = 256  # rows of Parquet at a time
_MAX_WINDOW = 1 << 31  # bytes, the largest window that a writer can use (`zstd --long=31`)


def decompressed(path: Path) -> Path:
    """The path without ``.gz`` and ``.zst``."""
    return path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path


def format_of(path: Path) -> str:
    """``"jsonl"``, ``"parquet"`` or ``"text"``, by the name without ``.gz`` and ``.zst``.

    A name such as ``x.json`` or ``x.jsonl.txt`` is ambiguous: the format is then ``"jsonl"`` if the
    first nonblank line is a JSON object. Raises like ``read_text`` if the file is damaged.
    """
    plain = decompressed(path)
    suffix = plain.suffix.lower()
    if suffix in _JSON_LINES:
        return "jsonl"
    if suffix == ".parquet":
        return "parquet"
    unclear = suffix == ".json" or any(part.lower() in _JSON_LINES for part in plain.suffixes)
    return "jsonl" if unclear and _begins_with_object(path) else "text"


def _begins_with_object(path: Path) -> bool:
    lines = (line for line, _ in _lines(_chunks(path)) if line.strip())
    try:
        return type(parsed_json(next(lines, b""))) is dict
    except ValueError:
        return False


def read_text(path: Path) -> Iterator[tuple[str, int]]:
    """The text of a file in chunks, with line ends unchanged and without a byte order mark.

    Raises:
        ValueError: it is not UTF-8 (the message has the position of the byte), or its compressed
            data is damaged.
        ImportError: it needs zstandard, which is not installed.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    start = 0  # position of the chunk in the decompressed bytes
    first = True
    data, position = b"", 0
    try:
        for data, position in _chunks(path):
            if text := decoder.decode(data):
                if text := text.removeprefix("\ufeff") if first else text:
                    yield text, position
                first = False
            start += len(data)
        data = b""
        decoder.decode(data, final=True)
    except UnicodeDecodeError as error:
        wrong = start - (len(error.object) - len(data)) + error.start
        raise ValueError(
            f"the input {path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position "
            f"{wrong} ({error.reason})"
        ) from error


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Within the block, prefix a ValueError with ``where``, such as "line 3 of the input FILE"."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def read_json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str, int]]:
    """For each line of a file, which must be a JSON object: the object, "line 3 of the input FILE",
    and the position. Blank lines are skipped.

    Raises:
        ValueError: a line is not a JSON object; or like ``read_text``.
    """
    for number, (line, position) in enumerate(_lines(_chunks(path)), 1):
        if line.isspace() or not line:
            continue
        where = f"line {number} of the input {path}"
        try:
            row = parsed_json(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if type(row) is not dict:
            raise ValueError(f"{where} must be a JSON object, got {type(row).__name__}")
        yield row, where, position


def read_jsonl(path: Path, text_key: str) -> Iterator[tuple[str, int]]:
    """The texts of a file with one JSON object per line.

    Raises:
        ValueError: like ``read_json_lines``; or an object has no text under ``text_key``.
    """
    for row, where, position in read_json_lines(path):
        yield checked_text(row, text_key, where), position


def read_parquet(path: Path, text_key: str) -> Iterator[tuple[str, int]]:
    """The texts of one column.

    Raises:
        ValueError: the file is not Parquet, is damaged, has no such column, or has a value that is
            not a text.
        ImportError: pyarrow is not installed.
    """
    pyarrow = optional("pyarrow", f"the input {path}", "data")
    parquet = optional("pyarrow.parquet", f"the input {path}", "data")
    size, row = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            if text_key not in file.schema_arrow.names:
                raise ValueError(
                    f"the input {path} has no column {text_key!r}, but the columns "
                    f"{', '.join(file.schema_arrow.names)}; name one with --text_key"
                )
            rows = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_ROWS, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    where = f"row {row} of the input {path}"
                    yield checked_text({text_key: value}, text_key, where), size * row // rows
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # from the system; pyarrow's has none
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"the input {path} is damaged: {reason}") from error


def checked_text(row: dict[str, Any], text_key: str, where: str) -> str:
    """``row[text_key]``, ``in_utf8``.

    Raises:
        ValueError: there is no such key, or its value is not a str.
    """
    if text_key not in row:
        raise ValueError(
            f"{where} has no {text_key!r}, but {', '.join(map(repr, row)) or 'nothing'}; name one "
            "with --text_key"
        )
    text = row[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{where} must have a text as {text_key!r}, got {type(text).__name__}")
    return in_utf8(text)


def _chunks(path: Path) -> Iterator[tuple[bytes, int]]:
    """The decompressed content, and the number of bytes of the file read so far."""
    with path.open("rb") as raw:
        if path.suffix.lower() == ".zst":
            content = _zstd(path, iter(lambda: raw.read(_CHUNK // 16), b""))  # can expand 100-fold
        elif path.suffix.lower() == ".gz":
            content = _gzip(path, gzip.GzipFile(fileobj=raw))
        else:
            content = iter(lambda: raw.read(_CHUNK), b"")
        for data in content:
            yield data, raw.tell()


def _gzip(path: Path, file: gzip.GzipFile) -> Iterator[bytes]:
    try:
        yield from iter(lambda: file.read(_CHUNK), b"")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"the input {path} is damaged: {error}") from error


def _zstd(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The content of all frames. Raises ValueError if the file ends within a frame."""
    zstandard = optional("zstandard", f"the input {path}", "data")
    decompressor, frame = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW), None
    try:
        for chunk in chunks:
            while chunk:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise ValueError(f"the input {path} is damaged: {error}") from error
    if frame is not None:
        raise ValueError(f"the input {path} is damaged: it ends within its last frame")


def _lines(chunks: Iterable[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    parts: list[bytes] = []  # of a line that continues in the next chunk
    position = 0
    for data, position in chunks:
        first, *more = data.split(b"\n")
        parts.append(first)
        for line in more:
            yield b"".join(parts), position
            parts = [line]
    if parts:
        yield b"".join(parts), position
