"""A tiny assistant's data: a text about words to train a base model on, and dialogues about words.

    python -m fastgpt.assistant.words data/words

writes ``base.txt``, ``train.jsonl`` and ``heldout.jsonl``. The words are random letters; those of
the held-out dialogues are in neither of the other files. The text has questions too, but never an
answer behind one.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from fastgpt._files import atomic_write, check_folder

Dialogue = list[dict[str, str]]


class _Task(NamedTuple):
    question: str
    follow_up: str
    fact: str
    answer: Callable[[str], str]


_TASKS = (
    _Task("Say {} backwards.", "And backwards?", "{} backwards is {}.", lambda w: w[::-1]),
    _Task("Write {} in capitals.", "And in capitals?", "{} in capitals is {}.", str.upper),
    _Task("Say {} twice.", "And twice?", "{} twice is {}.", lambda w: w + w),
)
_LETTERS = "abdeiklmnoprstu"
_LENGTHS = (3, 4, 5)
_QUESTION_SHARE = 0.2  # of the text's lines


class Words(NamedTuple):
    """The text of a base model, and the dialogues to train and to measure an assistant with."""

    base: str
    train: list[Dialogue]
    heldout: list[Dialogue]


def words(seed: int = 0, lines: int = 60000, train: int = 2000, heldout: int = 300) -> Words:
    """The data of ``seed``: a text of so many ``lines``, and so many dialogues."""
    draw = random.Random(seed)
    kept = [_word(draw) for _ in range(heldout)]
    left_out = set(kept)

    def known() -> str:
        word = _word(draw)
        return known() if word in left_out else word

    return Words(
        "".join(_line(draw, known()) + "\n" for _ in range(lines)),
        [_dialogue(draw, known()) for _ in range(train)],
        [_dialogue(draw, word) for word in kept],
    )


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(_LETTERS, k=draw.choice(_LENGTHS)))


def _line(draw: random.Random, word: str) -> str:
    task = draw.choice(_TASKS)
    if draw.random() < _QUESTION_SHARE:
        return draw.choice((task.question.format(word), task.follow_up))
    return task.fact.format(word, task.answer(word))


def _dialogue(draw: random.Random, word: str) -> Dialogue:
    """One task, or two with the same word."""
    first, second = draw.sample(_TASKS, 2)
    turns = [(first.question.format(word), first.answer(word))]
    if draw.random() < 0.5:
        turns.append((second.follow_up, second.answer(word)))
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def write_dialogues(dialogues: Iterable[Dialogue], path: Path) -> None:
    """Write a ``.jsonl`` for ``fastgpt prepare --dialogues``, atomically."""
    with atomic_write(path) as file:
        file.writelines((json.dumps({"messages": d}) + "\n").encode() for d in dialogues)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a tiny assistant's data.")
    parser.add_argument("out_dir", type=Path, help="folder of base.txt, train.jsonl, heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    check_folder(given.out_dir)
    given.out_dir.mkdir(parents=True, exist_ok=True)
    data = words(given.seed)
    with atomic_write(given.out_dir / "base.txt") as file:
        file.write(data.base.encode())
    write_dialogues(data.train, given.out_dir / "train.jsonl")
    write_dialogues(data.heldout, given.out_dir / "heldout.jsonl")
    print(f"wrote base.txt, train.jsonl, heldout.jsonl to {given.out_dir}")


if __name__ == "__main__":
    main()
