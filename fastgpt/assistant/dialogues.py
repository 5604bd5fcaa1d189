"""A file of dialogues as the source of a data set.

    source = DialogueSource("dialogues.jsonl")
    prepare(source, ChatTokenizer(tokenizer), "data/chat")

Each line of the file is a JSON object: ``{"messages": [{"role": "user", "content": "..."},
{"role": "assistant", "content": "..."}, ...]}``. Keys other than ``messages`` are ignored.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.assistant import template
from fastgpt.data.file_formats import naming, read_json_lines
from fastgpt.data.sources import Chunk, Piece, Source, split_of, stamp
from fastgpt.tokenizer import ChatTokenizer, Tokenizer
from fastgpt.tokenizer.base import in_utf8

DIALOGUES_VAL_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Dialogue(Piece):
    """A piece whose text is the concatenation of all contents.

    Attributes:
        messages: see ``template.check``.
        where: "line 3 of the input FILE".
    """

    messages: list[template.Message]
    where: str


class DialogueSource(Source):
    """Dialogues to train on. Each must have an answer.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError, while reading: a line is not a dialogue. Names file, line and field.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"the dialogues {path} are not a file")

    def identity(self) -> dict[str, Any]:
        return {"dialogues": stamp(self._path)}

    def documents(self) -> Iterator[Iterable[Chunk]]:
        return ([(piece.text, piece.fraction)] for piece in self.pieces(0.5, 0))

    def pieces(self, val_share: float, seed: int) -> Iterator[Dialogue]:
        """Like ``Source.pieces``, but dialogues are never cut: each is in one split as a whole."""
        size = max(self._path.stat().st_size, 1)
        for index, (messages, where, position) in enumerate(read_dialogues(self._path)):
            if all(message["role"] != "assistant" for message in messages):
                raise ValueError(f"{where}: messages has no answer: none of role 'assistant'")
            text = "".join(message["content"] for message in messages)
            split = split_of(index, val_share, seed)
            yield Dialogue(text, split, True, position / size, messages, where)

    def tokens(
        self, piece: Piece, tokenizer: Tokenizer, end: int | None
    ) -> npt.NDArray[np.integer[Any]]:
        assert isinstance(piece, Dialogue)
        if not isinstance(tokenizer, ChatTokenizer):
            raise TypeError(
                f"tokenizer must be a ChatTokenizer for dialogues, got {tokenizer.name}"
            )
        with naming(piece.where):
            return template.encode(tokenizer, piece.messages)[0]


def read_dialogues(path: Path) -> Iterator[tuple[list[template.Message], str, int]]:
    """For each line: its messages, its location, and the number of bytes read so far.

    Raises:
        ValueError: a line is not JSON, or its messages are not a dialogue.
    """
    for row, where, position in read_json_lines(path):
        with naming(where):
            template.check(row.get("messages"))
        yield [_in_utf8(message) for message in row["messages"]], where, position


def _in_utf8(message: template.Message) -> template.Message:
    return {**message, "content": in_utf8(message["content"])}
