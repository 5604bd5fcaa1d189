"""A ``tokenizer.json`` of GPT-2's kind by tiktoken, which gives the same ids several times faster.

The library tokenizers merges the pairs that the file lists, in its order; tiktoken merges whatever
two neighbours make a token, in the order of the ids. These are the same ids if the ids are in the
order of the merges, a merge puts together what bytes and earlier merges made, and every token is
what its own bytes are encoded to. For let two neighbours x and y stand in a text when all merges
before that of t = xy were made. None of those merges crossed a border of x or y, so in the text
"xy" alone they leave x and y as well; and as that text becomes t, the merge of t is that of x and
y: both libraries make it.

Which characters are letters, digits or space, each library knows from its own edition of Unicode.
A letter or digit that is newer than Unicode 3.2 may be unknown to one of them: such texts are left
to tokenizers.
"""

import json
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt

# What GPT-2 cuts a text into before bytes are merged, without backtracking where none can help.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Of a file's model, and the values that GPT-2's kind has.
_MODEL = {
    "type": ("BPE",),
    "dropout": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}


class ByteLevelBPE:
    """The ids of texts; made by ``of``."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding(
            "tokenizer.json", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self._known: set[str] = set()

    @classmethod
    def of(cls, data: bytes, model: Any) -> "ByteLevelBPE | None":
        """For the file ``data`` and the model that tokenizers made of it. None where the ids might
        differ, or tiktoken is not installed.
        """
        ranks = _ranks(json.loads(data), model)
        if ranks is None:
            return None
        try:
            return cls(ranks)
        except ImportError:
            return None

    def knows(self, text: str) -> bool:
        """Whether both libraries have the same classes for its characters."""
        if text.isascii():
            return True
        new = set(text) - self._known
        if not all(map(_has_one_class, new)):
            return False
        self._known |= new
        return True

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, disallowed_special=())


def byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies write a byte in JSON: printable Latin-1 characters as they are,
    the other 68 bytes in their order as the characters from U+0100 on.
    """
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != 0x20]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def _has_one_class(character: str) -> bool:
    """Whether all editions of Unicode from 6.3 on agree on letter, digit, space or none of them.
    An unknown character is none, so only letters and digits can be too new, or not made yet."""
    category = unicodedata.category(character)
    if category in ("Cn", "Cs"):
        return False
    old = unicodedata.ucd_3_2_0.category(character) != "Cn"
    return old or category[0] not in "LN"


def _ranks(form: dict[str, Any], model: Any) -> dict[bytes, int] | None:
    """Token → id, of bytes and merges; None if the file is not of GPT-2's kind."""
    cuts = form.get("pre_tokenizer") or {}
    is_gpt2s = (
        form.get("normalizer") is None
        and cuts.get("type") == "ByteLevel"
        and cuts.get("add_prefix_space") is False
        and cuts.get("use_regex", True)
        and all(token["special"] for token in form.get("added_tokens", []))
        and all(form["model"].get(name) in values for name, values in _MODEL.items())
    )
    if not is_gpt2s:
        return None
    vocabulary: dict[str, int] = form["model"]["vocab"]
    to_byte = byte_of_character()
    if not all(character in vocabulary for character in to_byte):
        return None
    made = {character: vocabulary[character] for character in to_byte}
    last = -1
    for merge in form["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = left + right
        place = vocabulary.get(token, -1)
        if left not in made or right not in made or token in made or place <= last:
            return None
        if [found.id for found in model.tokenize(token)] != [place]:
            return None
        made[token] = last = place
    return {bytes(to_byte[c] for c in token): place for token, place in made.items()}
