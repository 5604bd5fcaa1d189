"""The interface of all tokenizers: text to ids, ids to text, and a file in the data's folder."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fastgpt._files import writing

END_OF_TEXT = "<|endoftext|>"

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        FILE: the name of its file in the folder of a data set.
        name: a description for messages, such as ``"GPT-2 BPE"``.
        vocab_size: V; every id lies in [0, V).
        end_of_text: the id that ends a document, or None.
        file_bytes: the content of that file.
        fingerprint: SHA-256 in hex of everything that determines the ids.
    """

    FILE: ClassVar[str]
    name: str
    vocab_size: int
    end_of_text: int | None
    file_bytes: bytes

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.file_bytes).hexdigest()

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary size of a model: V rounded up to a multiple of 64, for speed."""
        return -(-self.vocab_size // 64) * 64

    def fits(self, vocab_size: int) -> bool:
        """Whether a model with ``vocab_size`` tokens, padding included, can use this tokenizer."""
        return self.vocab_size <= vocab_size

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a prompt. Names of special tokens are encoded as these tokens."""

    @abstractmethod
    def encode_array(self, text: str) -> npt.NDArray[np.integer[Any]]:
        """The ids of a piece of data. Names of special tokens are encoded as plain text.
        Thread-safe."""

    def decode(self, ids: TokenIds) -> str:
        """The text of ``ids``: a sequence or one-dimensional array of integers.

        Raises:
            TypeError: ``ids`` are not integers.
            ValueError: an id is negative or not below ``vocab_size``.
        """
        return self._decode(_checked_ids(ids, self.vocab_size))

    def save(self, path: str | Path) -> None:
        """Write a file from which the tokenizer can be loaded."""
        with writing(Path(path)):
            Path(path).write_bytes(self.file_bytes)

    @abstractmethod
    def _decode(self, ids: npt.NDArray[np.int64]) -> str: ...


def _checked_ids(ids: TokenIds, vocab_size: int) -> npt.NDArray[np.int64]:
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"ids must have one dimension, got shape {array.shape}")
    if array.size == 0:
        return np.empty(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"ids must be integers, got {array.dtype}")
    wrong = (array < 0) | (array >= vocab_size)
    if wrong.any():
        position = int(np.argmax(wrong))
        raise ValueError(
            f"ids must lie in [0, {vocab_size}), got {array[position]} at position {position}"
        )
    return array.astype(np.int64)


def in_utf8(text: str) -> str:
    """``text`` with lone surrogates replaced by U+FFFD. JSON and command lines can contain them,
    UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
