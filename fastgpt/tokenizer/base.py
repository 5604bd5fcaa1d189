"""What every tokenizer has: ids for a text, the text of ids, and a file beside the data.

Knows numpy and the standard library alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

END_OF_TEXT = "<|endoftext|>"

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes:
        FILE: the name under which ``save`` writes it into the folder of a data set.
        name: the kind, and what it was made from: ``"GPT-2 BPE"``.
        vocab_size: V; every id lies in [0, V).
        end_of_text: the id that stands behind each document; None where there is none.
        fingerprint: SHA-256 in hex of all that decides on the ids.
    """

    FILE: ClassVar[str]
    name: str
    vocab_size: int
    end_of_text: int | None
    fingerprint: str

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary of a model for these ids: V, or more, where matrix products are faster."""
        return -(-self.vocab_size // 64) * 64

    def fits(self, vocab_size: int) -> bool:
        """Whether it can be that of a model with so many tokens, some of them only for speed."""
        return self.vocab_size <= vocab_size

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a prompt; the names of special tokens in it mean these tokens.

        Raises:
            TypeError: ``text`` is no str.
        """

    @abstractmethod
    def encode_array(self, text: str) -> npt.NDArray[np.integer[Any]]:
        """The ids of a piece of data, in which the names of special tokens are plain text. Safe to
        call from several threads at a time.

        Raises:
            TypeError: ``text`` is no str.
        """

    @abstractmethod
    def decode(self, ids: TokenIds) -> str:
        """The text of ``ids``: a sequence or one-dimensional array of integers.

        Raises:
            TypeError: ``ids`` does not hold integers.
            ValueError: an id is negative or not below ``vocab_size``.
        """

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the file from which it can be loaded again."""


def check_text(text: str) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")


def checked_ids(ids: TokenIds, vocab_size: int) -> npt.NDArray[np.int64]:
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
