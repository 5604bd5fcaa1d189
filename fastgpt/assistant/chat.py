"""Answers of a model fine-tuned on dialogues, in a chat and to the questions in a file.

chat = Chat(Sampler(SampleConfig(chat=True)))
for piece in chat.say("Say lemon backwards."):
    print(piece, end="")
"""

from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastgpt.assistant import template
from fastgpt.assistant.dialogues import read_dialogues
from fastgpt.data.file_formats import naming
from fastgpt.sampler import Sampler
from fastgpt.tokenizer import ChatTokenizer

_SHORTEST_TURN = 5  # tokens: <|user|>, one of a message, <|end|>, <|assistant|>, one of an answer


class Chat:
    """A dialogue with the model. When it no longer fits into the model's context, the oldest turns
    are dropped, but not the system message.

    Args:
        sampler: a sampler of a model fine-tuned on dialogues.
        system: the system message, if not empty.

    Attributes:
        messages: the part of the dialogue so far that the model sees.
        forgotten: the number of messages that the last ``say`` dropped.
        cut: whether the last answer was cut off at the maximum number of tokens.

    Raises:
        ValueError: the model was not fine-tuned on dialogues, or ``system`` has unknown characters,
            or leaves no room for a message and an answer.
    """

    def __init__(self, sampler: Sampler, system: str = "") -> None:
        self._sampler, self._tokenizer = sampler, chat_tokenizer(sampler)
        self.messages: list[template.Message] = []
        if system:
            self.messages = [{"role": "system", "content": system}]
            tokens, _ = template.encode(self._tokenizer, self.messages)
            block_size = sampler.model.config.block_size
            if len(tokens) + _SHORTEST_TURN > block_size:
                raise ValueError(
                    f"system makes {len(tokens)} tokens, too many for the model's context of "
                    f"{block_size}: a message and its answer need at least {_SHORTEST_TURN}"
                )
        self.forgotten, self.cut = 0, False

    def say(self, content: str) -> Generator[str, None, None]:
        """The answer to a user's message, in pieces as it is generated. When the generator ends or
        is closed, the message and the part of the answer that was read are added to the dialogue,
        unless nothing was read.

        Raises:
            ValueError: immediately, if the message is empty, longer than the context, or has
                unknown characters.
        """
        messages = [*self.messages, {"role": "user", "content": content}]
        ids, kept, room = fitting(self._sampler, self._tokenizer, messages)
        self.forgotten, self.cut = len(messages) - len(kept), False
        return self._answer(ids, kept, room)

    def _answer(
        self, ids: list[int], kept: list[template.Message], room: int
    ) -> Generator[str, None, None]:
        answer = ""
        pieces = self._sampler.stream_answer(ids, template.stops(self._tokenizer), room)
        try:
            while True:
                piece = next(pieces)
                answer += piece
                yield piece
        except StopIteration as stop:
            self.cut = stop.value.finish == "length"
        finally:
            if answer:
                self.messages = [*kept, {"role": "assistant", "content": answer}]


def fitting(
    sampler: Sampler, tokenizer: ChatTokenizer, messages: Sequence[template.Message]
) -> tuple[list[int], list[template.Message], int]:
    """The prompt for an answer, the messages in it, and the maximum number of tokens of the answer.
    Drops the oldest turns until a quarter of the context is left for the answer, or
    ``max_new_tokens`` if that is less.

    Raises:
        ValueError: the last message alone exceeds the context; or like ``template.prompt``.
    """
    kept, block_size = list(messages), sampler.model.config.block_size
    most = sampler.config.max_new_tokens
    ids = template.prompt(tokenizer, kept)
    oldest = int(kept[0]["role"] == "system")
    while len(ids) + min(most, block_size // 4) > block_size and len(kept) > oldest + 1:
        del kept[oldest : oldest + 2]
        ids = template.prompt(tokenizer, kept)
    if len(ids) >= block_size:
        raise ValueError(
            f"the message makes a prompt of {len(ids)} tokens, but the model's context is "
            f"{block_size}, the answer included"
        )
    return ids, kept, min(most, block_size - len(ids))


class Answer(NamedTuple):
    """The model's answer to a question in a file, and the file's own answer."""

    question: str  # the user's last message
    answer: str  # the model's
    expected: str  # the file's
    forgotten: int  # number of oldest messages that did not fit into the context


def answers(sampler: Sampler, path: Path) -> Iterator[Answer]:
    """Answer every user message in a file of dialogues, given the messages before it as far as they
    fit (see ``fitting``), ``batch_size`` at a time.

    Raises:
        ValueError: like ``read_dialogues`` and ``fitting``, naming file and line; or the file has
            no answers.
    """
    tokenizer, ends = chat_tokenizer(sampler), template.stops(chat_tokenizer(sampler))
    asked: list[tuple[list[int], int, Answer]] = []
    for messages, where, _ in read_dialogues(path):
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            with naming(where):
                ids, kept, room = fitting(sampler, tokenizer, messages[:number])
            question, forgotten = messages[number - 1]["content"], number - len(kept)
            asked.append((ids, room, Answer(question, "", message["content"], forgotten)))
    if not asked:
        raise ValueError(f"the dialogues {path} have no answer to compare with")
    for start in range(0, len(asked), sampler.config.batch_size):
        batch = asked[start : start + sampler.config.batch_size]
        found = sampler.answers([(ids, room) for ids, room, _ in batch], ends)
        for (*_, item), completion in zip(batch, found, strict=True):
            yield item._replace(answer=completion.text)


def chat_tokenizer(sampler: Sampler) -> ChatTokenizer:
    """The sampler's tokenizer.

    Raises:
        ValueError: it has no tokens for dialogues.
    """
    if not isinstance(sampler.tokenizer, ChatTokenizer):
        raise ValueError(
            "chat and dialogues need a model that was fine-tuned on a data set of "
            f"'fastgpt prepare --dialogues', but this one's tokenizer is {sampler.tokenizer.name}"
        )
    return sampler.tokenizer
