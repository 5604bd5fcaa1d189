"""From a bigram table to GPT, one idea at a time, after Andrej Karpathy's lecture "Let's build GPT"
(2023). ``fastgpt ladder`` trains every rung on the same batches with the same trainer.

    for result in climb(["bigram", "head"], data_dir, out_dir): print(result.val_loss)

In shape comments B is the batch size, T the sequence length, C the width, V the vocabulary size.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt._progress import AnyConsole
from fastgpt.bigram import Bigram
from fastgpt.blocks import MLP, Block, CausalSelfAttention, LayerNorm
from fastgpt.devices import autocast
from fastgpt.language_model import GPTConfig, LanguageModel
from fastgpt.model import GPT
from fastgpt.sampler import start_ids, write
from fastgpt.training import log
from fastgpt.training.config import TrainConfig
from fastgpt.training.presets import PRESETS
from fastgpt.training.trainer import Trainer

# -- layers, (B, T, C) → (B, T, C)


class Average(nn.Module):
    """The mean over past tokens, by the attention op: a zero query scores all tokens equally."""

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]  # (B, 1, T, C): one head
        return ops.attention(torch.zeros_like(x), x, x)[:, 0]


class Head(nn.Module):
    """One head of self-attention. A token's query is what it looks for, its key what it contains,
    its value what it passes on: softmax(query · key / sqrt(C)) weights the values of past tokens.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.Linear(config.n_embd, config.n_embd, bias=False) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        q, k, v = (ops.linear(x, layer.weight)[:, None] for layer in layers)  # (B, 1, T, C)
        return ops.attention(q, k, v)[:, 0]


class Heads(nn.Module):
    """``n_head`` heads in parallel, each C / n_head wide; one matmul computes all q, k and v."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        qkv = ops.linear(x, self.c_attn.weight)  # (B, T, 3C)
        return ops.attention_qkvpacked(qkv, self.n_head)


class Residual(nn.Module):
    """Heads with a projection, then the MLP, each added to its input: ``Block`` without norms."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn = CausalSelfAttention(config, ops)
        self.mlp = MLP(config, ops)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x)


# -- models


class Stack(LanguageModel):
    """Token and position embedding, ``layers`` one after another, a head for the logits.

    The initial weights are PyTorch's defaults, as in the lecture. With GPT-2's (std 0.02) the
    signals in layers without LayerNorm are too small to train well in 5000 updates.
    """

    def __init__(self, config: GPTConfig, *layers: nn.Module) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.layers = nn.Sequential(*layers)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def _hidden(self, idx: Tensor) -> Tensor:
        x = ops.embedding(idx, self.wte.weight, self.wpe.weight)  # (B, T, C)
        return self.layers(x)

    def _logits(self, idx: Tensor, last_only: bool) -> Tensor:
        x = self._hidden(idx)
        return ops.linear(x[:, -1:] if last_only else x, self.lm_head.weight)  # (B, T, V)

    def _loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        return ops.linear_cross_entropy(self._hidden(idx), self.lm_head.weight, targets)


RUNGS: dict[str, Callable[[GPTConfig], LanguageModel]] = {
    "bigram": Bigram,
    "average": lambda c: Stack(c, Average()),
    "head": lambda c: Stack(c, Head(c)),
    "heads": lambda c: Stack(c, Heads(c)),
    "feed-forward": lambda c: Stack(c, Heads(c), MLP(c, ops)),
    "residual": lambda c: Stack(c, *(Residual(c) for _ in range(c.n_layer))),
    "layernorm": lambda c: Stack(
        c, *(Block(c, ops) for _ in range(c.n_layer)), LayerNorm(c.n_embd, c.bias, ops)
    ),
    "scaled": GPT,
}

# -- training

# The lecture's sizes, and its AdamW with PyTorch's defaults.
_KEYS: dict[str, Any] = {
    "eval_interval": 500,
    "eval_iters": 200,
    "log_interval": 250,
    "gradient_accumulation_steps": 1,
    "batch_size": 32,
    "block_size": 8,
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 32,
    "learning_rate": 1e-3,
    "decay_lr": False,
    "max_iters": 5000,
    "weight_decay": 0.01,
    "beta2": 0.999,
    "grad_clip": 0.0,
}
_SAMPLE_TOKENS, _SAMPLE_TEMPERATURE, _SAMPLE_TOP_K = 60, 1.0, 200


@dataclass(frozen=True)
class Result:
    """The result of training a rung. Losses are means over evaluated batches, in nats per token."""

    rung: str
    parameters: int
    train_loss: float
    val_loss: float
    tokens_per_second: float  # the median of the reports
    sample: str
    rows: list[log.Row]  # the run's log


def keys_of(rung: str) -> dict[str, Any]:
    """The configuration keys for training a rung. The last rung uses the preset ``char``.

    Raises ValueError for an unknown rung.
    """
    if rung not in RUNGS:
        raise ValueError(f"rungs must be among {', '.join(RUNGS)}, got {rung!r}")
    if rung == "scaled":
        return PRESETS["char"]
    # AdamW moves a weight by about the learning rate per update, and logits must grow large.
    return _KEYS | {"model": "bigram", "learning_rate": 1e-2} if rung == "bigram" else _KEYS


def climb(
    rungs: Iterable[str],
    data_dir: Path,
    out_dir: Path,
    console: "AnyConsole | None" = None,
    **changes: Any,
) -> Iterator[Result]:
    """Train each rung on the data set in ``data_dir``, with its log in ``out_dir``, and yield its
    result. ``changes`` overrides keys of all rungs. Raises like ``Trainer``.
    """
    for rung in rungs:
        keys = keys_of(rung) | {"data_root": str(data_dir.parent), "dataset": data_dir.name}
        config = TrainConfig(**(keys | {"out_dir": str(out_dir / rung)} | changes))
        trainer = Trainer(config, console, build=RUNGS[rung])
        n_params = trainer.model.get_num_params(non_embedding=False)
        trainer.console.print(f"{rung}: {n_params:,} parameters on {trainer.device}")
        trainer.run()
        yield _result(rung, trainer)


def _result(rung: str, trainer: Trainer) -> Result:
    rows = log.read(trainer.out_dir / log.LOG)
    tokenizer = trainer.tokenizer
    assert tokenizer is not None  # every character-level data set has one
    start = start_ids(tokenizer)
    text = write(
        trainer.model.eval(),
        tokenizer,
        start,
        _SAMPLE_TOKENS,
        _SAMPLE_TEMPERATURE,
        _SAMPLE_TOP_K,
        autocast(trainer.device, trainer.dtype),
    )
    return Result(
        rung=rung,
        parameters=trainer.model.get_num_params(non_embedding=False),
        train_loss=[row["train/loss"] for row in rows if "train/loss" in row][-1],
        val_loss=trainer.val_loss,
        tokens_per_second=statistics.median(
            row["tokens_per_second"] for row in rows if "tokens_per_second" in row
        ),
        sample=text[len(tokenizer.decode(start)) :],
        rows=rows,
    )
