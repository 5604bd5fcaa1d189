"""Text sources: a file, a folder, or a Hugging Face data set, read piece by piece.

    for piece in FileSource("texts").pieces(val_share=0.01, seed=0): ...

A **document** is a text file, a line of ``.jsonl``, or a row of Parquet or of a data set. Each
document goes to one split as a whole. If there are so few that one split would get none, the
documents are treated as one text and split as in nanoGPT: the beginning is for training, the end
for validation, and at most one document is cut.

To bound memory, a document of more than about a million characters is cut into pieces. Cuts do not
change the tokens of GPT-2's BPE or of any tokenizer that splits at white space, because they are
after a single line feed or else before a single space. Only half a million characters without
either are cut at an arbitrary position.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt._optional import optional
from fastgpt.data.file_formats import checked_text, format_of, read_jsonl, read_parquet, read_text
from fastgpt.tokenizer.base import Tokenizer

PIECE = 1 << 20  # characters

# A part of a document, and the fraction of the input read so far, None if the size is unknown.
Chunk = tuple[str, float | None]


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long one.

    Attributes:
        text: at least one character.
        split: ``"train"`` or ``"val"``.
        ends_document: whether the document ends here.
        fraction: how much of the input has been read, 0 to 1; None if its size is unknown.
    """

    text: str
    split: str
    ends_document: bool
    fraction: float | None


class Source(ABC):
    """An input that yields the same pieces every time it is read."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON values that identify the input: names, sizes, modification times."""

    @abstractmethod
    def documents(self) -> Iterator[Iterable[Chunk]]:
        """The chunks of each document. Read them before asking for the next document."""

    def pieces(self, val_share: float, seed: int) -> Iterator[Piece]:
        """All pieces in order. A document is for validation with probability ``val_share``, which
        depends only on ``seed`` and the document's number. If that leaves a split empty, the last
        ``val_share`` of all characters is for validation.
        """
        if self._too_few(val_share, seed):
            lengths = [sum(len(text) for text, _ in chunks) for chunks in self.documents()]
            total = sum(lengths)
            cut = int(total * (1 - val_share))
            if min(cut, total - cut) >= 2:
                yield from self._cut(lengths, cut)
                return
        for index, chunks in enumerate(self.documents()):
            yield from _pieces(chunks, split_of(index, val_share, seed))

    def _too_few(self, val_share: float, seed: int) -> bool:
        """Whether a split gets no document. Reads up to the first document of the second split."""
        first = split_of(0, val_share, seed)
        numbers = (index for index, _ in enumerate(self.documents()))
        return all(split_of(index, val_share, seed) == first for index in numbers)

    def _cut(self, lengths: list[int], cut: int) -> Iterator[Piece]:
        """The pieces of documents with these ``lengths``; from character ``cut`` on, validation."""
        twice = zip(self.documents(), self.documents(), strict=True)
        for length, (chunks, same_chunks) in zip(lengths, twice, strict=True):
            here = min(max(cut, 0), length)
            yield from _pieces(_between(chunks, 0, here), "train")
            yield from _pieces(_between(same_chunks, here, length), "val")
            cut -= length

    def tokens(
        self, piece: Piece, tokenizer: Tokenizer, end: int | None
    ) -> npt.NDArray[np.integer[Any]]:
        """The ids of a piece, followed by the id ``end`` (unless None) if a document ends there."""
        ids = tokenizer.encode_array(piece.text)
        return ids if end is None or not piece.ends_document else np.append(ids, np.uint32(end))

    def texts(self) -> Iterator[str]:
        """The text of all pieces."""
        return (piece.text for chunks in self.documents() for piece in _pieces(chunks, "train"))


class TextSource(Source):
    """One text, in a UTF-8 file or in memory."""

    def __init__(self, text: Path | str) -> None:
        self._text = text

    def identity(self) -> dict[str, Any]:
        if isinstance(self._text, Path):
            return {"text": stamp(self._text)}
        data = self._text.encode("utf-8", "surrogatepass")
        return {"text": hashlib.sha256(data).hexdigest()}

    def documents(self) -> Iterator[Iterable[Chunk]]:
        yield self._chunks()

    def pieces(self, val_share: float, seed: int) -> Iterator[Piece]:
        """The first ``1 - val_share`` of the characters are for training, the rest for validation;
        ``seed`` has no effect.

        Raises:
            ValueError: a part has fewer than 2 characters, one input and its target.
        """
        total = self.length()
        if not total:
            return
        cut = int(total * (1 - val_share))
        if min(cut, total - cut) < 2:
            raise ValueError(
                f"the text has {total} characters: with val_share={val_share} that is {cut} for "
                f"training and {total - cut} for validation, but each needs at least 2"
            )
        yield from self._cut([total], cut)

    def length(self) -> int:
        """The number of characters."""
        return sum(len(text) for text, _ in self._chunks())

    def _chunks(self) -> Iterator[Chunk]:
        if isinstance(self._text, Path):
            size = max(self._text.stat().st_size, 1)
            return ((text, position / size) for text, position in read_text(self._text))
        return iter([(self._text, 1.0)])


class FileSource(Source):
    """A file of documents, or all files below a folder in the order of their names, except hidden
    ones.

    Each line of a ``.jsonl`` is a JSON object with the key ``text_key``; a ``.parquet`` has such a
    column; any other file is one UTF-8 text (see ``format_of``). ``.gz`` and ``.zst`` are
    decompressed.

    Raises:
        FileNotFoundError: ``path`` does not exist.
        ValueError: the folder has no files. While reading: a file is damaged or not UTF-8, or a
            line or row has no text under ``text_key``; the message names the file and position.
        ImportError, while reading: pyarrow or zstandard is not installed.
    """

    def __init__(self, path: str | Path, text_key: str = "text") -> None:
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"the input {path} does not exist")
        self.paths = _files_of(path) if path.is_dir() else [path]
        if not self.paths:
            raise ValueError(f"the input {path} is a folder without files")
        self._text_key = text_key

    def identity(self) -> dict[str, Any]:
        return {"files": [stamp(path) for path in self.paths], "text_key": self._text_key}

    def documents(self) -> Iterator[Iterable[Chunk]]:
        sizes = [path.stat().st_size for path in self.paths]
        before, total = 0, max(sum(sizes), 1)
        for path, size in zip(self.paths, sizes, strict=True):
            yield from self._documents_of(path, before, total)
            before += size

    def _documents_of(self, path: Path, before: int, total: int) -> Iterator[Iterable[Chunk]]:
        kind = format_of(path)
        if kind == "text":
            yield ((text, (before + position) / total) for text, position in read_text(path))
            return
        read = read_jsonl if kind == "jsonl" else read_parquet
        for text, position in read(path, self._text_key):
            yield [(text, (before + position) / total)]


class DatasetSource(Source):
    """A streamed Hugging Face data set: ``name`` on the hub, or a folder.

    Raises:
        ImportError: datasets is not installed.
        FileNotFoundError, ValueError, ConnectionError: raised by datasets if there is no such data
            set, configuration or split, or no connection.
        ValueError, while reading: a row has no text under ``text_key``.
    """

    def __init__(
        self, name: str, config: str | None = None, split: str = "train", text_key: str = "text"
    ) -> None:
        datasets = optional("datasets", "a data set of Hugging Face's", "data")
        self._identity = {"dataset": name, "config": config, "split": split, "text_key": text_key}
        self._name, self._text_key = name, text_key
        try:
            self._rows = datasets.load_dataset(name, config, split=split, streaming=True)
        except RuntimeError as error:  # a loading script, which datasets no longer runs
            raise ValueError(f"the data set {name}: {error}") from error

    def identity(self) -> dict[str, Any]:
        return self._identity

    def documents(self) -> Iterator[Iterable[Chunk]]:
        for number, row in enumerate(self._rows, 1):
            where = f"row {number} of the data set {self._name}"
            yield [(checked_text(row, self._text_key, where), None)]


def source_of(path: str | Path, text_key: str = "text") -> Source:
    """A ``TextSource`` if ``path`` is one text file or a folder with nothing else, otherwise a
    ``FileSource``, which see for errors.
    """
    source = FileSource(path, text_key)
    if len(source.paths) == 1 and format_of(source.paths[0]) == "text":
        return TextSource(source.paths[0])
    return source


def _files_of(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path: path.relative_to(folder).parts for path in files}
    shown = [path for path in files if not any(part.startswith(".") for part in names[path])]
    return sorted(shown, key=names.__getitem__)


def stamp(path: Path) -> list[str | int]:
    """Name, size and modification time, which identify a file without reading it."""
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _uniform(seed: int, index: int) -> float:
    """A pseudorandom number in [0, 1), a hash of the arguments."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def split_of(index: int, val_share: float, seed: int) -> str:
    """The split of document number ``index``."""
    return "val" if _uniform(seed, index) < val_share else "train"


def _between(chunks: Iterable[Chunk], start: int, stop: int) -> Iterator[Chunk]:
    """The characters ``start`` to ``stop`` of a text."""
    position = 0
    for text, fraction in chunks:
        if part := text[max(start - position, 0) : max(stop - position, 0)]:
            yield part, fraction
        position += len(text)
        if position >= stop:
            return


def _pieces(chunks: Iterable[Chunk], split: str) -> Iterator[Piece]:
    """The pieces of one document."""
    buffer, fraction = "", None
    for chunk, fraction in chunks:
        buffer += chunk
        while len(buffer) > PIECE:
            end = _end_of_piece(buffer)
            yield Piece(buffer[:end], split, False, fraction)
            buffer = buffer[end:]
    if buffer:
        yield Piece(buffer, split, True, fraction)


def _end_of_piece(text: str) -> int:
    """Where to cut a text longer than ``PIECE``; see the module's docstring."""
    for character, offset in (("\n", 1), (" ", 0)):
        position = text.rfind(character, PIECE // 2, PIECE)
        while position > 0:
            if not text[position - 1].isspace() and not text[position + 1].isspace():
                return position + offset
            position = text.rfind(character, PIECE // 2, position)
    return PIECE
