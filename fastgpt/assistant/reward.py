"""``fastgpt reward``: train a reward model on pairs of answers.

Each line of the data set is an object with ``messages``, a dialogue that ends with a user message,
and two answers to it, ``chosen`` and ``rejected``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt._progress import AnyConsole
from fastgpt.assistant import template
from fastgpt.assistant.reward_model import PairLoss, RewardModel, pair_loss, rows
from fastgpt.assistant.stage import Stage, StageConfig, held_out, loaded_gpt
from fastgpt.data.file_formats import naming
from fastgpt.tokenizer import ChatTokenizer
from fastgpt.tokenizer.base import in_utf8
from fastgpt.training.run import Figures


@dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """Train a reward model on pairs of answers."""

    # JSONL file of pairs: {"messages": [...], "chosen": "...", "rejected": "..."}
    dataset: str
    # Folder for ckpt.pt and log.jsonl.
    out_dir: str = "out-reward"
    # Pairs per micro-batch.
    batch_size: int = 32


class Pair(NamedTuple):
    prompt: tuple[int, ...]
    chosen: list[int]  # the whole dialogue
    rejected: list[int]


def read_pair(tokenizer: ChatTokenizer, block_size: int, row: dict[str, Any]) -> Pair:
    """The pair in a row of the data set. Raises ValueError naming the field."""
    prompt = template.prompt(tokenizer, row.get("messages", []))
    answers = []
    for key in ("chosen", "rejected"):
        text = row.get(key)
        if not isinstance(text, str) or not text:
            raise ValueError(f"{key} must be a text, not empty, got {text!r:.60}")
        with naming(key):
            answer = [*tokenizer.encode_array(in_utf8(text)).tolist(), tokenizer.end]
        if len(prompt) + len(answer) > block_size:
            raise ValueError(
                f"{key} must end within the model's block_size of {block_size} tokens, got "
                f"{len(prompt) + len(answer)} with its messages"
            )
        answers.append(prompt + answer)
    if answers[0] == answers[1]:
        raise ValueError(f"rejected must differ from chosen, got {row['chosen']!r:.60} twice")
    return Pair(tuple(prompt), *answers)


class RewardTraining(Stage):
    """A run of ``fastgpt reward``. Raises the errors of the config, the data and the model:
    ValueError, FileNotFoundError, NotADirectoryError.
    """

    config: RewardConfig

    def __init__(self, config: RewardConfig, console: AnyConsole) -> None:
        gpt, tokenizer = loaded_gpt(config.init_from)
        read = partial(read_pair, tokenizer, gpt.config.block_size)
        train, self.val = held_out(config, read, lambda pair: pair.prompt)
        model = RewardModel(gpt.config, gpt.gelu_approximate)
        model.load_state_dict(gpt.state_dict(), strict=False)
        super().__init__(config, model, PairLoss, tokenizer, train, console)
        console.print(f"{len(self.train):,} pairs, {len(self.val):,} more held out")

    def _update(self, learning_rate: float) -> tuple[dict[str, Tensor], int]:
        pairs = self._next_rows()
        batches = [self._batch(part) for part in self._parts(pairs)]
        n_tokens = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
        return {"pair_loss": self._updated(batches, learning_rate)}, n_tokens

    def _parts(self, pairs: list[Pair]) -> Iterator[list[Pair]]:
        for start in range(0, len(pairs), self.config.batch_size):
            yield pairs[start : start + self.config.batch_size]

    def _batch(self, pairs: list[Pair]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        return rows(texts, self.device), torch.zeros(len(pairs), device=self.device)

    @torch.no_grad()
    def evaluate(self) -> Figures:
        """Mean loss, share of positive margins and mean margin over the held-out pairs."""
        with self.autocast:
            parts = [self.loss(*self._batch(part))[0] for part in self._parts(self.val)]
        margins = torch.cat(parts)
        return {
            "pair_loss": pair_loss(margins).item(),
            "accuracy": (margins > 0).float().mean().item(),
            "margin": margins.mean().item(),
        }
