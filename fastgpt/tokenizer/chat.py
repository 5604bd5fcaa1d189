"""A tokenizer with five additional tokens that mark the messages of a dialogue."""

import base64
import hashlib
import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt._files import parsed_json
from fastgpt.tokenizer.base import Tokenizer

# Appended to the base vocabulary in this order. The first begins a dialogue, the last ends a
# message, each of the others begins a message of that role.
SPECIAL_TOKENS = ("<|dialogue|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

_NAMES = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
_VERSION = 1


class ChatTokenizer(Tokenizer):
    """The ids of ``base``, followed by five for ``SPECIAL_TOKENS``.

    ``encode`` encodes their names as these tokens. ``encode_array`` encodes them as plain text, so
    that no message can end itself or imitate another role.

    Args:
        base: any tokenizer but a ``ChatTokenizer``.

    Attributes:
        base: the tokenizer of the messages.
        begin: the id of ``<|dialogue|>``, and ``base.vocab_size``; also ``end_of_text``.
        end: the id of ``<|end|>``.
    """

    FILE = "chat_tokenizer.json"

    def __init__(self, base: Tokenizer) -> None:
        if isinstance(base, ChatTokenizer):
            raise TypeError("base must be a tokenizer without the tokens of a dialogue")
        self.base = base
        self.begin = base.vocab_size
        self.end = self.begin + SPECIAL_TOKENS.index("<|end|>")
        self.vocab_size = self.begin + len(SPECIAL_TOKENS)
        self.name = f"{base.name}, with the tokens of dialogues"
        self.end_of_text: int | None = self.begin
        content = {
            "version": _VERSION,
            "special_tokens": SPECIAL_TOKENS,
            "base": base.FILE,
            "content": base64.b64encode(base.file_bytes).decode(),
        }
        self.file_bytes = (json.dumps(content, indent=1) + "\n").encode()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"chat {self.base.fingerprint}".encode()).hexdigest()

    def id_of(self, role: str) -> int:
        """The id that begins a message of ``role``: "system", "user" or "assistant"."""
        return self.begin + SPECIAL_TOKENS.index(f"<|{role}|>")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in _NAMES.split(text):
            if part in SPECIAL_TOKENS:
                ids.append(self.begin + SPECIAL_TOKENS.index(part))
            elif part:
                ids += self.base.encode(part)
        return ids

    def encode_array(self, text: str) -> npt.NDArray[np.integer[Any]]:
        return self.base.encode_array(text)

    def _decode(self, ids: npt.NDArray[np.int64]) -> str:
        parts = []
        for special, run in groupby(ids.tolist(), lambda token: token >= self.begin):
            if special:
                parts += [SPECIAL_TOKENS[token - self.begin] for token in run]
            else:
                parts.append(self.base.decode(list(run)))
        return "".join(parts)


def base_in(path: Path) -> tuple[str, bytes]:
    """The name and content of the base tokenizer's file, from a file by ``ChatTokenizer.save``.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        content = parsed_json(path.read_text(encoding="utf-8"))
        if content["version"] != _VERSION or tuple(content["special_tokens"]) != SPECIAL_TOKENS:
            raise ValueError(f"it is not of version {_VERSION}")
        return content["base"], base64.b64decode(content["content"], validate=True)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a usable {ChatTokenizer.FILE}: {error}") from error
