"""Character-level tokenizer, in the format of nanoGPT's ``meta.pkl``."""

import hashlib
import pickle
import pickletools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.tokenizer.base import Tokenizer

MAX_VOCAB_SIZE = 1 << 16  # train.bin and val.bin store ids as uint16


class CharTokenizer(Tokenizer):
    """One id per character; the line feed, if in the vocabulary, ends a document. ``encode`` and
    ``encode_array`` (uint16) raise ValueError for a character that is not in the vocabulary.

    Args:
        itos: the character of each id. Ids are 0 to len(itos) - 1, characters distinct.

    Attributes:
        itos: id → character (``dict[int, str]``).
        stoi: character → id (``dict[str, int]``).
        vocab_size: the number of characters.

    Raises:
        TypeError: a key is not an int, or a value not a str.
        ValueError: there are no characters or more than 65,536, the ids have a gap, a value is not
            a single character, or a character occurs twice.
    """

    FILE = "meta.pkl"

    def __init__(self, itos: dict[int, str]) -> None:
        _check_itos(itos)
        self.itos = dict(sorted(itos.items()))
        self.stoi = {char: i for i, char in self.itos.items()}
        self.vocab_size = len(self.itos)
        self._code_points = _code_points("".join(self.itos.values()))  # by id
        # The id of each code point, or -1. Larger code points are clipped to the last entry, -1.
        self._ids = np.full(int(self._code_points.max()) + 2, -1, dtype=np.int32)
        self._ids[self._code_points] = np.arange(self.vocab_size)
        self.name = "characters"
        self.end_of_text = self.stoi.get("\n")
        meta = {"vocab_size": self.vocab_size, "itos": self.itos, "stoi": self.stoi}
        self.file_bytes = pickle.dumps(meta, protocol=4)  # as nanoGPT writes it

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._code_points.tobytes()).hexdigest()

    @property
    def padded_vocab_size(self) -> int:
        """V, because nanoGPT does not pad a vocabulary of characters."""
        return self.vocab_size

    def fits(self, vocab_size: int) -> bool:
        return self.vocab_size == vocab_size

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharTokenizer":
        """The characters of all ``texts`` in the order of their code points.

        Raises:
            ValueError: the texts are empty or have more than 65,536 distinct characters.
        """
        seen = np.zeros(0x110000, dtype=np.bool_)  # one flag per Unicode code point
        for text in texts:
            seen[_code_points(text)] = True
        codes: list[int] = np.flatnonzero(seen).tolist()
        if not codes:
            raise ValueError("the input is empty: it has no text")
        if len(codes) > MAX_VOCAB_SIZE:
            raise ValueError(
                f"text must have at most {MAX_VOCAB_SIZE} distinct characters (ids are stored as "
                f"uint16), got {len(codes)}"
            )
        return cls({i: chr(code) for i, code in enumerate(codes)})

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> npt.NDArray[np.uint16]:
        ids = self._ids.take(_code_points(text), mode="clip")
        if ids.size and ids.min() < 0:
            position = int(np.argmax(ids < 0))
            raise ValueError(
                f"text has {text[position]!r} at position {position}, which is not among the "
                f"{self.vocab_size} characters of the vocabulary"
            )
        return ids.astype(np.uint16)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        return self._code_points[ids].tobytes().decode("utf-32-le", "surrogatepass")

    @classmethod
    def load(cls, path: str | Path) -> "CharTokenizer":
        """Read nanoGPT's ``meta.pkl``. Nothing in the file is executed.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a pickle of dicts, strings and ints, or its entries
                contradict each other.
        """
        try:
            return _of_meta(_unpickle_plain(Path(path).read_bytes()))
        except (pickle.UnpicklingError, LookupError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a usable meta.pkl: {error}") from error


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    """The code points of ``text``, including lone surrogates."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _check_itos(itos: dict[int, str]) -> None:
    if not 1 <= len(itos) <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"itos must have 1 to {MAX_VOCAB_SIZE} characters (ids are stored as uint16), "
            f"got {len(itos)}"
        )
    for i, char in itos.items():
        if type(i) is not int or type(char) is not str:
            raise TypeError(f"itos must map int to str, got the entry {i!r}: {char!r}")
        if len(char) != 1:
            raise ValueError(f"itos must map to single characters, got the entry {i}: {char!r}")
        if not 0 <= i < len(itos):
            raise ValueError(f"itos must have the ids 0 to {len(itos) - 1}, got {i}")
    if len(set(itos.values())) != len(itos):
        ((twice, _),) = Counter(itos.values()).most_common(1)
        raise ValueError(f"itos must have distinct characters, got {twice!r} more than once")


_PLAIN_CODES = frozenset(
    "PROTO FRAME STOP MARK EMPTY_DICT DICT SETITEM SETITEMS UNICODE BINUNICODE SHORT_BINUNICODE "
    "INT BININT BININT1 BININT2 LONG LONG1 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET "
    "LONG_BINGET".split()
)


def _unpickle_plain(data: bytes) -> Any:
    """Unpickle dicts, strings and ints. Checks all opcodes before executing the first."""
    names = ["", ""]  # the last two strings: the arguments of STACK_GLOBAL
    for code, argument, position in pickletools.genops(data):
        if code.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            name = ".".join(names[-2:]) if argument is None else argument.replace(" ", ".")
            raise pickle.UnpicklingError(f"it asks for {name} at byte {position}")
        if code.name not in _PLAIN_CODES:
            raise pickle.UnpicklingError(
                f"it may hold dicts, strings and ints only, but has {code.name} at byte {position}"
            )
        # The memo is an array, for which a damaged index could allocate 64 GB.
        if code.name.endswith("PUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"it has the memo entry {argument} at byte {position}")
        if isinstance(argument, str):
            names.append(argument)
    return pickle.loads(data)


def _of_meta(meta: Any) -> CharTokenizer:
    """The tokenizer of an unpickled ``meta.pkl``. Raises TypeError or ValueError if it is wrong."""
    if type(meta) is not dict:
        raise TypeError(f"it must be a dict, got {type(meta).__name__}")
    for key, kind in (("vocab_size", int), ("itos", dict), ("stoi", dict)):
        if type(meta.get(key)) is not kind:
            found = type(meta[key]).__name__ if key in meta else "nothing"
            raise TypeError(f"{key} must be a {kind.__name__}, got {found}")
    tokenizer = CharTokenizer(meta["itos"])
    if meta["vocab_size"] != tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size is {meta['vocab_size']}, but itos has {tokenizer.vocab_size} entries"
        )
    if meta["stoi"] != tokenizer.stoi:
        raise ValueError("stoi is not the inverse of itos")
    return tokenizer
