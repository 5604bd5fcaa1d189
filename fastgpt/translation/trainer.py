"""Training of a translation model: the paper's schedule, label-smoothed loss, Adam.

    trainer = TranslationTrainer(TranslationConfig(task="numbers"))
    trainer.run()

Iteration i: set the learning rate → forward and backward of batch i → clip → Adam. Batch i depends
only on the seed and i, so a resumed run continues exactly as if it had not been stopped.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastgpt._files import atomic_write
from fastgpt._progress import AnyConsole
from fastgpt.data.sources import TextSource
from fastgpt.seq2seq import PADDING, Seq2Seq, Seq2SeqConfig
from fastgpt.tokenizer import CharTokenizer, Tokenizer, packed, tokenizer_from
from fastgpt.tokenizer.training import KINDS, train_tokenizer
from fastgpt.training import checkpoint as ckpt
from fastgpt.training.log import LOG
from fastgpt.training.run import Run
from fastgpt.translation.built_in import TASKS, Pairs
from fastgpt.translation.config import TranslationConfig
from fastgpt.translation.pairs import (
    Batch,
    Batches,
    encoded_pairs,
    hold_out,
    read_tsv,
    read_two_files,
)
from fastgpt.translation.translator import LAST, Tokenizers, load_model

HELD_OUT = "held_out.tsv"

_SHAPE_KEYS = ("n_layer", "n_head", "n_embd", "dropout", "label_smoothing")
BETAS = (0.9, 0.98)  # the paper's
# The keys that a resumed run may change. The content of the texts must be the same.
_MAY_CHANGE = {"resume", "out_dir", "max_iters", "eval_interval", "log_interval", "device"}
_MAY_CHANGE |= {"source", "target", "pairs"}


def read_pairs(config: TranslationConfig) -> Pairs:
    """The parallel text that ``config`` names. Raises like ``read_lines``, and ValueError for a
    tab in one of two files."""
    if config.task is not None:
        return TASKS[config.task](config.seed)
    if config.pairs is not None:
        return read_tsv(config.pairs)
    assert config.source is not None and config.target is not None
    pairs = read_two_files(config.source, config.target)
    for number, pair in enumerate(pairs, start=1):
        if any("\t" in text for text in pair):
            raise ValueError(
                f"line {number} of {config.source} and of {config.target} must not contain a tab, "
                f"which separates the texts in {HELD_OUT}"
            )
    return pairs


def make_tokenizers(config: TranslationConfig, pairs: Pairs) -> Tokenizers:
    """The tokenizers of sources and targets; twice the same one if it is shared."""
    sources, targets = ([pair[side] for pair in pairs] for side in (0, 1))
    if config.shared or config.tokenizer not in ("char", *KINDS):
        one = _tokenizer(config, sources + targets)
        return one, one
    return _tokenizer(config, sources), _tokenizer(config, targets)


def _tokenizer(config: TranslationConfig, texts: list[str]) -> Tokenizer:
    if config.tokenizer == "char":
        return CharTokenizer.from_texts(texts)
    if config.tokenizer in KINDS:
        source = TextSource("\n".join(texts))
        with TemporaryDirectory() as folder:
            return train_tokenizer(source, config.tokenizer, config.vocab_size, folder)
    return tokenizer_from(config.tokenizer)


class TranslationTrainer(Run):
    """A training run: model, optimizer, data and progress; ``run`` trains.

    Attributes: ``config``, ``model`` (on ``device``), ``tokenizers``, ``train`` and ``val``
    (``Batches``), ``iter_num``, ``best_val_loss``.

    Raises the errors of the config, the texts and the checkpoint: ValueError, FileNotFoundError,
    NotADirectoryError, ImportError.
    """

    config: TranslationConfig
    model: Seq2Seq
    NEWEST = LAST
    FILES = (LAST, LOG, HELD_OUT)

    def __init__(self, config: TranslationConfig, console: "AnyConsole | None" = None) -> None:
        super().__init__(config, console)
        pairs = read_pairs(config)
        self._fingerprint = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        n_held_out = config.held_out
        if n_held_out is None:
            n_held_out = max(1, min(1000, len({source for source, _ in pairs}) // 20))
        train, self.held_out = hold_out(pairs, n_held_out, config.seed)
        path = self.out_dir / LAST
        saved = ckpt.load(path) if config.resume else None
        if saved is None:
            self.tokenizers = make_tokenizers(config, pairs)
            self.model = Seq2Seq(self._shape())
        else:
            self._check_same(saved)
            self.model, self.tokenizers = load_model(saved, path)
        self.train, self.val = (
            Batches(
                encoded_pairs(part, self.tokenizers, config.max_length),
                config.batch_tokens,
                config.seed,
            )
            for part in (train, self.held_out)
        )
        self.model.to(self.device)
        peak = self.learning_rate(config.warmup_iters - 1)
        self.optimizer = self._build_optimizer(self.model, 0.0, peak, BETAS)
        self._build_step(self.model)
        if saved is not None:
            self._restore(saved, saved, path)
            self.console.print(f"resuming at iteration {self.iter_num}")

    def _shape(self) -> Seq2SeqConfig:
        config = self.config
        source, target = self.tokenizers
        return Seq2SeqConfig(
            block_size=config.max_length,
            vocab_size=target.vocab_size + 1,  # with the end token
            source_vocab_size=None if source is target else source.vocab_size + 1,
            **{key: getattr(config, key) for key in _SHAPE_KEYS},
        )

    def _check_same(self, saved: ckpt.Checkpoint) -> None:
        """Raise ValueError naming the first key that a resumed run may not change."""
        before = saved.get("config", {})
        for key, value in _plain(self.config).items():
            if key not in _MAY_CHANGE and before.get(key) != value:
                raise ValueError(
                    f"{key} must be {before.get(key)!r} to resume {self.out_dir / LAST}, "
                    f"got {value!r}"
                )
        if saved.get("data_fingerprint") != self._fingerprint:
            raise ValueError(f"{self.out_dir / LAST} was trained on another parallel text")

    def learning_rate(self, iteration: int) -> float:
        """The paper's schedule: linear for ``warmup_iters``, then inverse square root."""
        config = self.config
        peak = config.learning_rate or (config.n_embd * config.warmup_iters) ** -0.5
        ratio = (iteration + 1) / config.warmup_iters
        return peak * min(ratio, ratio**-0.5)

    def _update(self, learning_rate: float) -> tuple[Mapping[str, Tensor], int]:
        batch = self.train[self.iter_num]
        n_tokens = sum(int((side != PADDING).sum()) for side in batch)
        return {"loss": self._updated([self._on_device(batch)], learning_rate)}, n_tokens

    @contextmanager
    def _own_out_dir(self) -> Iterator[None]:
        with super()._own_out_dir():
            with atomic_write(self.out_dir / HELD_OUT) as file:
                file.writelines(f"{a}\t{b}\n".encode() for a, b in self.held_out)
            yield

    def _on_device(self, batch: Batch) -> Batch:
        return Batch(batch.source.to(self.device), batch.target.to(self.device))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss in nats per token, without label smoothing, of the held-out pairs and of as many
        training batches: ``{"train": .., "val": ..}``."""
        self.model.eval()
        losses = {}
        every = max(1, len(self.train) // len(self.val))
        for name, batches, step in (("train", self.train, every), ("val", self.val, 1)):
            total = n_targets = 0.0
            for batch in list(batches.in_order())[::step]:
                n = int((batch.target != PADDING).sum())
                with self.autocast:
                    total += n * self.model(*self._on_device(batch))[1].item()
                n_targets += n
            losses[name] = total / n_targets
        self.model.train()
        return losses

    def _evaluate(self) -> bool:
        return self._record(self.evaluate())

    def _save(self, publish: bool) -> Path:
        path = self.out_dir / LAST
        state = {
            **self._state(),
            **self._own_state(),
            "source_tokenizer": packed(self.tokenizers[0]),
            "target_tokenizer": packed(self.tokenizers[1]),
            "best_val_loss": self.best_val_loss,
            "config": _plain(self.config),
            "data_fingerprint": self._fingerprint,
        }
        ckpt.save(state, path)
        if publish:
            ckpt.publish(path, self.out_dir / ckpt.BEST)
        return path


def _plain(config: TranslationConfig) -> dict[str, Any]:
    """The config as a dict for a checkpoint."""
    values = asdict(config).items()
    return {key: str(value) if isinstance(value, Path) else value for key, value in values}
