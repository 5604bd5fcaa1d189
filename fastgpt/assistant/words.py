"""Generated data for a tiny assistant: a text about words for a base model, and dialogues.

    python -m fastgpt.assistant.words words

writes ``base.txt``, ``train.jsonl``, ``pairs.jsonl`` and ``heldout.jsonl``. The words are random
letters; those of the held-out dialogues do not occur in the other files. The text also has
questions, but never followed by an answer. A pair is a dialogue with a right and a wrong answer.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

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
_QUESTION_SHARE = 0.2  # share of the text's lines


class Words(NamedTuple):
    """The text for a base model, dialogues for training and evaluating an assistant, and pairs of
    answers for ``fastgpt reward``."""

    base: str
    train: list[Dialogue]
    heldout: list[Dialogue]
    pairs: list[dict[str, Any]]


def words(
    seed: int = 0, lines: int = 60000, train: int = 2000, heldout: int = 300, pairs: int = 6000
) -> Words:
    """Generate the data from ``seed``, with these numbers of lines, dialogues and pairs."""
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
        [_pair(draw, _dialogue(draw, known())) for _ in range(pairs)],
    )


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(_LETTERS, k=draw.choice(_LENGTHS)))


def _line(draw: random.Random, word: str) -> str:
    task = draw.choice(_TASKS)
    if draw.random() < _QUESTION_SHARE:
        return draw.choice((task.question.format(word), task.follow_up))
    return task.fact.format(word, task.answer(word))


def _dialogue(draw: random.Random, word: str) -> Dialogue:
    """A dialogue of one task, or of two with the same word."""
    first, second = draw.sample(_TASKS, 2)
    turns = [(first.question.format(word), first.answer(word))]
    if draw.random() < 0.5:
        turns.append((second.follow_up, second.answer(word)))
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _pair(draw: random.Random, dialogue: Dialogue) -> dict[str, Any]:
    """A pair whose rejected answer has one letter missing, added or changed."""
    right = dialogue[-1]["content"]
    position, letter = draw.randrange(len(right)), draw.choice(_LETTERS)
    letter = letter.upper() if right.isupper() else letter
    rest = draw.choice((right[position:], right[position + 1 :], right[position + 1 :]))
    wrong = right[:position] + draw.choice(("", letter)) + rest
    if wrong == right:
        return _pair(draw, dialogue)
    return {"messages": dialogue[:-1], "chosen": right, "rejected": wrong}


def exact(prompt: str, answer: str) -> float:
    """A reward for ``fastgpt rl``: 1 for the right answer, else 0."""
    question, *more = prompt.split("\n")
    for task in _TASKS:
        before, after = task.question.split("{}")
        if question.startswith(before) and question.endswith(after):
            word = question.removeprefix(before).removesuffix(after)
            asked = [task, *(other for other in _TASKS if other.follow_up in more)][-1]
            return float(answer == asked.answer(word))
    raise ValueError(f"{question!r} is not a question about a word")


def write_dialogues(dialogues: Iterable[Dialogue], path: Path) -> None:
    """Write a ``.jsonl`` for ``fastgpt prepare --dialogues``, atomically."""
    _write_lines(({"messages": dialogue} for dialogue in dialogues), path)


def _write_lines(rows: Iterable[dict[str, Any]], path: Path) -> None:
    with atomic_write(path) as file:
        file.writelines((json.dumps(row) + "\n").encode() for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a tiny assistant's data.")
    parser.add_argument("out_dir", type=Path, help="folder to write the files to")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    try:
        check_folder(given.out_dir)
    except NotADirectoryError as error:
        parser.error(str(error))
    given.out_dir.mkdir(parents=True, exist_ok=True)
    data = words(given.seed)
    with atomic_write(given.out_dir / "base.txt") as file:
        file.write(data.base.encode())
    write_dialogues(data.train, given.out_dir / "train.jsonl")
    write_dialogues(data.heldout, given.out_dir / "heldout.jsonl")
    _write_lines(data.pairs, given.out_dir / "pairs.jsonl")
    print(f"wrote base.txt, train.jsonl, pairs.jsonl, heldout.jsonl to {given.out_dir}")


if __name__ == "__main__":
    main()
