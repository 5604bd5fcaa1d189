"""``fastgpt sample``: print samples as text or JSON, or interactively."""

import contextlib
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastgpt.assistant.chat import Chat, answers
from fastgpt.sampler import Completion, Sampler, read_prompts
from fastgpt.training.config import SampleConfig

_EXIT = "/exit"


def run_sample(config: SampleConfig, console: Console, errors: Console) -> None:
    """Print samples to ``console``, notes (such as which checkpoint replaces ckpt.pt) and, with
    ``interactive`` or ``chat``, the errors of a prompt to ``errors``.

    Raises like ``Sampler``.
    """
    sampler = Sampler(config)
    if sampler.note:
        errors.print(f"note: {sampler.note}")
    if config.interactive:
        _dialogue(sampler, console, errors)
        return
    if config.chat:
        _chat(Chat(sampler, config.system), config.seed, console, errors)
        return
    if config.dialogues:
        _exact_matches(sampler, console, errors)
        return
    for batch in sampler.batches():
        if config.json:
            _print_json(sampler.complete(batch), console)
        elif config.batch_size == 1:
            _print_growing(sampler, batch[0], console)
            console.rule()
        else:
            for completion in sampler.complete(batch):
                console.out(completion.prompt + completion.text)  # print would expand tabs
                console.rule()


def _print_json(completions: Iterable[Completion], console: Console) -> None:
    for completion in completions:
        fields = {
            "prompt": completion.prompt,
            "completion": completion.text,
            "tokens": completion.tokens,
            "finish": completion.finish,
        }
        _print_object(fields, console)


def _print_object(fields: dict[str, Any], console: Console) -> None:
    plain = not console.encoding.lower().startswith("utf")  # then use JSON's own escapes
    console.out(json.dumps(fields, ensure_ascii=plain))


def _print_growing(sampler: Sampler, prompt: str, console: Console) -> None:
    pieces = sampler.stream(prompt)
    console.out(prompt, end="")
    _print_pieces(pieces, console)


def _print_pieces(pieces: Iterable[str], console: Console) -> None:
    for piece in pieces:
        console.out(piece, end="")
        console.file.flush()
    console.out("")


def _chat(chat: Chat, seed: int, console: Console, errors: Console) -> None:
    torch.manual_seed(seed)
    for line in _lines("> "):
        if line.strip() == _EXIT:
            return
        with _turn(console, errors):
            with contextlib.closing(chat.say(line)) as pieces:
                if chat.forgotten:
                    errors.print(
                        f"note: the oldest {chat.forgotten} messages no longer fit into the "
                        "context and are forgotten"
                    )
                _print_pieces(pieces, console)
            if chat.cut:
                errors.print("note: the answer was cut off at its maximum number of tokens")


@contextlib.contextmanager
def _turn(console: Console, errors: Console) -> Iterator[None]:
    """Within the block, an error or Ctrl-C ends one answer; at a prompt they end the command."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        errors.print(f"error: {error}", style="bold red")
    except KeyboardInterrupt:
        console.out("")


def _exact_matches(sampler: Sampler, console: Console, errors: Console) -> None:
    torch.manual_seed(sampler.config.seed)
    total = exact = incomplete = 0
    for answer in answers(sampler, Path(sampler.config.dialogues)):
        total += 1
        exact += answer.answer == answer.expected
        incomplete += answer.forgotten > 0
        if sampler.config.json:
            _print_object(answer._asdict(), console)
    if not sampler.config.json:
        console.print(f"exact match: {exact} of {total} answers ({exact / total:.1%})")
    if incomplete:
        errors.print(
            f"note: {incomplete} questions were asked without the oldest messages, which no longer "
            "fit"
        )


def _dialogue(sampler: Sampler, console: Console, errors: Console) -> None:
    torch.manual_seed(sampler.config.seed)
    for line in _lines("" if sampler.config.json else "> "):
        with _turn(console, errors):
            (prompt,) = read_prompts(line)
            if sampler.config.json:
                _print_json(sampler.complete([prompt]), console)
            else:
                _print_growing(sampler, prompt, console)


def _lines(prompt: str) -> Iterator[str]:
    """The nonempty lines of stdin. As in a file of prompts, they end with a line feed or with a
    carriage return and a line feed; a byte order mark at the beginning is removed.
    """
    typed = sys.stdin.isatty()
    if not typed and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(newline="\n")
    for number in itertools.count():
        try:
            line = input(prompt) if typed else _next_line()
        except EOFError:
            return
        if number == 0:
            line = line.removeprefix("\ufeff")
        if line:
            yield line


def _next_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")
