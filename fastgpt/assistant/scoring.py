"""Scoring of answers by a reward model or a user's function."""

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastgpt.assistant.reward_model import RewardModel, rows
from fastgpt.assistant.stage import loaded
from fastgpt.language_model import GPTConfig
from fastgpt.tokenizer import ChatTokenizer
from fastgpt.training import checkpoint as ckpt

_ROWS = 64  # texts that the reward model reads at a time


class Prompt(NamedTuple):
    text: str  # the contents of its messages, joined by line feeds
    tokens: tuple[int, ...]  # the whole dialogue, up to the beginning of an answer
    answer: str | None  # the answer in the data set


class Answer(NamedTuple):
    tokens: list[int]  # including the token that ended it
    text: str
    ended: bool  # False if it was cut off at max_new_tokens


# (B) prompts and their answers → rewards (B,), float32, on the model's device
Scorer = Callable[[Sequence[Prompt], Sequence[Answer]], Tensor]


def scorer(
    source: str,
    tokenizer: ChatTokenizer,
    length: int,
    device: torch.device,
    autocast: AbstractContextManager[object],
) -> Scorer:
    """The scorer for the key ``reward``: the reward model in a folder, which must accept texts of
    ``length`` tokens, or the function ``module:function``.

    Raises ValueError, ImportError or FileNotFoundError naming the key. The scorer raises ValueError
    if the function fails or returns anything but a finite number.
    """
    if ":" in source and not Path(source).exists():
        return _by_function(source, device)
    return _by_model(_reward_model(source, tokenizer, length).to(device), device, autocast)


def _by_function(source: str, device: torch.device) -> Scorer:
    module, _, name = source.partition(":")
    if "" not in sys.path:  # the installed command does not search the current folder
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # any error of the user's module
        raise ValueError(f"reward={source!r} cannot be imported: {_in_one_line(error)}") from error
    if not callable(function):
        raise ValueError(f"reward={source!r}: {module} has no function {name!r}")

    def rate(prompt: Prompt, answer: Answer) -> float:
        call = f"reward={source!r} with prompt {prompt.text!r:.80} and answer {answer.text!r:.80}"
        try:
            reward = function(prompt.text, answer.text)
        except Exception as error:  # any error of the user's function
            raise ValueError(f"{call} failed: {_in_one_line(error)}") from error
        with contextlib.suppress(TypeError, ValueError):
            if math.isfinite(number := float(reward)):
                return number
        raise ValueError(f"{call} must return a finite number, got {reward!r:.80}")

    def score(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Tensor:
        rewards = list(map(rate, prompts, answers))
        return torch.tensor(rewards, dtype=torch.float32, device=device)

    return score


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _reward_model(source: str, tokenizer: ChatTokenizer, length: int) -> RewardModel:
    checkpoint, its_tokenizer, path = loaded(source, "reward")
    if ckpt.REWARD_HEAD not in checkpoint["model"]:
        raise ValueError(
            f"reward must be the folder of a reward model, which `fastgpt reward` trains, or "
            f"module:function, but {path} holds a language model"
        )
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"reward={source!r} was trained on other tokens than those of init_from")
    args = {**checkpoint["model_args"], "dropout": 0.0}
    if args["block_size"] < length:
        raise ValueError(
            f"reward={source!r} reads at most {args['block_size']} tokens, but a prompt and its "
            f"answer may have {length}"
        )
    model = RewardModel(GPTConfig(**args), ckpt.own_state(checkpoint)["gelu"])
    model.load_state_dict(checkpoint["model"])
    return model.requires_grad_(False).eval()


def _by_model(
    model: RewardModel, device: torch.device, autocast: AbstractContextManager[object]
) -> Scorer:
    @torch.no_grad()
    def score(prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Tensor:
        texts = [[*p.tokens, *a.tokens] for p, a in zip(prompts, answers, strict=True)]
        rewards = []
        for start in range(0, len(texts), _ROWS):
            with autocast:
                rewards.append(model.rewards(*rows(texts[start : start + _ROWS], device)))
        return torch.cat(rewards).float()

    return score
