"""The chat template: how a dialogue is encoded as tokens, in training and in sampling.

    <|dialogue|> <|user|>What is 2 plus 3?<|end|> <|assistant|>5<|end|>

(without the spaces). A token begins the dialogue, each message begins with a token for its role and
ends with an end token. Contents are encoded separately, so that a cut between messages changes no
token. The training targets are the answers: the tokens after ``<|assistant|>`` up to and including
``<|end|>``. A sampled answer ends at ``<|end|>``; see ``stops``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastgpt.data.file_formats import naming
from fastgpt.tokenizer import ChatTokenizer
from fastgpt.tokenizer.chat import SPECIAL_TOKENS

ROLES = ("system", "user", "assistant")

Message = Mapping[str, Any]  # {"role": ..., "content": ...}

ASSISTANT = SPECIAL_TOKENS.index("<|assistant|>")  # offset from the id of <|dialogue|>


def encode(
    tokenizer: ChatTokenizer, messages: Sequence[Message]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_]]:
    """The tokens (N,) of a dialogue, and which of them (N,) are targets.

    Raises:
        ValueError: the messages are not a dialogue (see ``check``), or a content has characters
            that the tokenizer lacks. Names the field, such as ``messages[1].content``.
    """
    check(messages)
    parts: list[npt.NDArray[np.integer[Any]]] = [_one(tokenizer.begin)]
    for number, message in enumerate(messages):
        with naming(f"messages[{number}].content"):
            content = tokenizer.encode_array(message["content"])
        parts += [_one(tokenizer.id_of(message["role"])), content, _one(tokenizer.end)]
    tokens = np.concatenate(parts, dtype=np.uint32)
    return tokens, answer_mask(tokens, tokenizer.begin)


def prompt(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> list[int]:
    """The tokens of a dialogue up to the beginning of an answer to its last message.

    Raises:
        ValueError: like ``encode``; or the last message is not a user's.
    """
    tokens, _ = encode(tokenizer, messages)
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"messages[{len(messages) - 1}].role must be 'user' for an answer to follow, got "
            f"{messages[-1]['role']!r}"
        )
    ids: list[int] = tokens.tolist()
    return [*ids, tokenizer.id_of("assistant")]


def stops(tokenizer: ChatTokenizer) -> range:
    """The tokens that end an answer: ``<|end|>``, and the other special tokens, which a poorly
    trained model may draw."""
    return range(tokenizer.begin, tokenizer.vocab_size)


def answer_mask(tokens: npt.NDArray[np.integer[Any]], begin: int) -> npt.NDArray[np.bool_]:
    """Which tokens (..., N) are targets: those whose nearest preceding special token is
    ``<|assistant|>``. Each row must start at the beginning of a dialogue; ``begin`` is the id of
    ``<|dialogue|>``.
    """
    special = np.where(tokens >= begin, np.arange(tokens.shape[-1]), 0)
    nearest = np.maximum.accumulate(special, axis=-1)[..., :-1]  # before the next token
    mask = np.zeros(tokens.shape, dtype=np.bool_)
    mask[..., 1:] = np.take_along_axis(tokens, nearest, axis=-1) == begin + ASSISTANT
    return mask


def check(messages: object) -> None:
    """Check that ``messages`` are a dialogue: an optional system message, then alternating user and
    assistant messages, each a dict with a role and a nonempty content.

    Raises:
        ValueError: they are not. Names the field, its value and what is allowed.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages must be a list with at least one message, got {messages!r:.60}")
    with_system = isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
    for number, message in enumerate(messages):
        name = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{name} must be an object with role and content, got {message!r:.60}")
        for key, value in message.items():
            if key not in ("role", "content") and value is not None:
                raise ValueError(f"{name}.{key} is not known: allowed are role and content")
        allowed = ROLES[1 + (number - with_system) % 2] if number or not with_system else ROLES[0]
        role, content = message.get("role"), message.get("content")
        if role != allowed:
            also = " or 'system'" if number == 0 else ""
            raise ValueError(f"{name}.role must be {allowed!r}{also} here, got {role!r:.60}")
        if not isinstance(content, str) or not content:
            raise ValueError(f"{name}.content must be a text, not empty, got {content!r:.60}")


def _one(token: int) -> npt.NDArray[np.uint32]:
    return np.array([token], dtype=np.uint32)
