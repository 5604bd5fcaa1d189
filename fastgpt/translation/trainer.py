"""The training of a translation model: the paper's schedule, label-smoothed loss, Adam.

    trainer = TranslationTrainer(TranslationConfig(task="numbers"))
    trainer.run()

One update at iteration i: learning rate of i → batch i forward and backward → clip → Adam. Batches
and their order follow from the seed and i, so a resumed run is the run that was never stopped.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from fastgpt._files import atomic_write, check_folder, exclusive_lock
from fastgpt._progress import PlainConsole, progress_bar, run_console
from fastgpt.data.sources import TextSource
from fastgpt.devices import (
    autocast,
    random_states,
    resolve_device,
    resolve_dtype,
    set_random_states,
)
from fastgpt.seq2seq import PADDING, Seq2Seq, Seq2SeqConfig
from fastgpt.tokenizer import CharTokenizer, Tokenizer, tokenizer_from
from fastgpt.tokenizer.training import KINDS, train_tokenizer
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder
from fastgpt.training.config import TrainConfig
from fastgpt.training.log import LOG, RunLog
from fastgpt.training.optimizer import MasterAdamW, saved_state
from fastgpt.training.progress import interrupts
from fastgpt.training.step import Step
from fastgpt.translation.built_in import TASKS, Pairs
from fastgpt.translation.config import TranslationConfig, check_config
from fastgpt.translation.pairs import (
    Batch,
    Batches,
    encoded_pairs,
    hold_out,
    read_tsv,
    read_two_files,
)
from fastgpt.translation.translator import LAST, Tokenizers, load_model, model_entries

if TYPE_CHECKING:
    from rich.console import Console

HELD_OUT = "held_out.tsv"

BETAS = (0.9, 0.98)  # the paper's
# The keys that a resumed run may change; the text itself is compared.
_MAY_CHANGE = {"resume", "out_dir", "max_iters", "eval_interval", "log_interval", "device"}
_MAY_CHANGE |= {"source", "target", "pairs"}


def read_pairs(config: TranslationConfig) -> Pairs:
    """The parallel text that ``config`` names. Raises as ``read_lines`` does, and ValueError for a
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
                f"line {number} of {config.source} and of {config.target} must hold no tab, which "
                f"separates the texts in {HELD_OUT}"
            )
    return pairs


def make_tokenizers(config: TranslationConfig, pairs: Pairs) -> Tokenizers:
    """Of the sources and of the targets; the same one twice where it is shared."""
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


class TranslationTrainer:
    """A run: model, optimizer, data and progress; ``run`` trains.

    Attributes: ``config``, ``model`` (on ``device``), ``tokenizers``, ``train`` and ``val``
    (``Batches``), ``iter_num``, ``best_val_loss``.

    Raises what the config, the texts and the checkpoint raise: ValueError, FileNotFoundError,
    NotADirectoryError, ImportError.
    """

    def __init__(
        self, config: TranslationConfig, console: "Console | PlainConsole | None" = None
    ) -> None:
        check_config(config)
        self.config = config
        self.console = console or run_console()
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        check_folder(config.out_dir)
        pairs = read_pairs(config)
        self._fingerprint = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        n_held_out = config.held_out
        if n_held_out is None:
            n_held_out = max(1, min(1000, len({source for source, _ in pairs}) // 20))
        train, self.held_out = hold_out(pairs, n_held_out, config.seed)
        torch.manual_seed(config.seed)
        saved = ckpt.load(config.out_dir / LAST) if config.resume else None
        if saved is None:
            self.tokenizers = make_tokenizers(config, pairs)
            self.model = Seq2Seq(self._shape())
        else:
            self._check_same(saved)
            self.model, self.tokenizers = load_model(saved, config.out_dir / LAST)
        self.train, self.val = (
            Batches(
                encoded_pairs(part, self.tokenizers, config.max_length),
                config.batch_tokens,
                config.seed,
            )
            for part in (train, self.held_out)
        )
        self.model.to(self.device)
        self.optimizer = self._build_optimizer()
        self._autocast = autocast(self.device, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._step = Step(
            self.model,
            self.optimizer,
            self.device,
            grad_clip=config.grad_clip,
            autocast=self._autocast,
            scaler=self.scaler,
        )
        self.iter_num = 0
        self.best_val_loss = math.inf
        if saved is not None:
            self._restore(saved)

    def _shape(self) -> Seq2SeqConfig:
        config = self.config
        source, target = self.tokenizers
        return Seq2SeqConfig(
            block_size=config.max_length,
            vocab_size=target.vocab_size + 1,  # and the end token
            source_vocab_size=None if source is target else source.vocab_size + 1,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            dropout=config.dropout,
            label_smoothing=config.label_smoothing,
        )

    def _build_optimizer(self) -> torch.optim.Optimizer:
        peak = self.learning_rate(self.config.warmup_iters)
        if self.dtype == torch.bfloat16:
            return MasterAdamW(self.model, self.dtype, 0.0, peak, BETAS)
        return self.model.configure_optimizers(0.0, peak, BETAS, self.device.type)

    def _check_same(self, saved: ckpt.Checkpoint) -> None:
        """Raise ValueError naming the first key that a resumed run may not change."""
        before = saved.get("config", {})
        for key, value in _plain(self.config).items():
            if key not in _MAY_CHANGE and before.get(key) != value:
                raise ValueError(
                    f"{key} must be {before.get(key)!r} to resume {self.config.out_dir / LAST}, "
                    f"got {value!r}"
                )
        if saved.get("data_fingerprint") != self._fingerprint:
            raise ValueError(f"{self.config.out_dir / LAST} was trained on another parallel text")

    def _restore(self, saved: ckpt.Checkpoint) -> None:
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.iter_num = saved["iter_num"]
            self.best_val_loss = saved["best_val_loss"]
            set_random_states(saved["generators"], self.device)
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(saved["scaler"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            path = self.config.out_dir / LAST
            raise ValueError(f"{path} holds no state to go on from: {error}") from error
        self.console.print(f"going on at iteration {self.iter_num}")

    def learning_rate(self, iteration: int) -> float:
        """The paper's: linear up to ``warmup_iters``, then the inverse square root."""
        config = self.config
        peak = config.learning_rate or (config.n_embd * config.warmup_iters) ** -0.5
        ratio = (iteration + 1) / config.warmup_iters
        return peak * min(ratio, ratio**-0.5)

    def run(self) -> None:
        """Train up to ``max_iters`` updates; evaluate and save on the way.

        Ctrl-C ends the update in progress, saves and raises KeyboardInterrupt. A loss that is not
        finite raises FloatingPointError, and nothing is saved. ValueError if another process
        trains into ``out_dir``.
        """
        config = self.config
        log_config = TrainConfig(
            out_dir=str(config.out_dir),
            eval_interval=config.eval_interval,
        )
        log = RunLog(log_config)
        self.model.train()
        with (
            self._own_out_dir(),
            log.opened(log_config, self.iter_num),
            progress_bar("training") as show,
            interrupts() as interrupted,
        ):
            since, n_tokens = perf_counter(), 0
            while self.iter_num < config.max_iters and not interrupted.is_set():
                if self.iter_num % config.eval_interval == 0:
                    before = perf_counter()
                    self._evaluate_and_save(log)
                    since += perf_counter() - before
                batch = self.train[self.iter_num]
                n_tokens += sum(int((side != PADDING).sum()) for side in batch)
                rate = self.learning_rate(self.iter_num)
                loss = self._step([self._on_device(batch)], rate)
                if self.iter_num % config.log_interval == 0:
                    self._check_finite()
                    mean, now = loss.item(), perf_counter()
                    speed = n_tokens / (now - since)
                    log.report(self.iter_num, mean, rate, speed, None)
                    show(self.iter_num / config.max_iters, f"loss {mean:.3f}")
                    since, n_tokens = now, 0
                self.iter_num += 1
            if interrupted.is_set():
                self._check_finite()
                self._save(config.out_dir / LAST)
                self.console.print(
                    f"stopped before iteration {self.iter_num}; saved {config.out_dir / LAST}. Go "
                    "on by the same command with --resume"
                )
                raise KeyboardInterrupt
            self._evaluate_and_save(log)

    @contextmanager
    def _own_out_dir(self) -> Iterator[None]:
        """``out_dir`` locked for this run, without an earlier run's files."""
        out_dir = self.config.out_dir
        out_dir.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(out_dir):
            if not self.config.resume:
                moved = checkpoint_folder.archive_previous_run(out_dir, (LAST, LOG, HELD_OUT))
                if moved:
                    self.console.print(f"an earlier run's files are now in {moved}")
            with atomic_write(out_dir / HELD_OUT) as file:
                file.writelines(f"{a}\t{b}\n".encode() for a, b in self.held_out)
            yield

    def _on_device(self, batch: Batch) -> Batch:
        return Batch(batch.source.to(self.device), batch.target.to(self.device))

    def _check_finite(self) -> None:
        if self._step.not_finite:
            raise FloatingPointError(
                f"the loss or its gradient is not finite at iteration {self.iter_num} or since "
                "the last report before it: training diverged; try a smaller learning_rate than "
                f"{self.learning_rate(self.config.warmup_iters - 1):.3g}"
            )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss in nats per token without label smoothing, of the held-out pairs, and of as many
        batches for training: ``{"train": .., "val": ..}``."""
        self.model.eval()
        losses = {}
        every = max(1, len(self.train) // len(self.val))
        for name, batches, step in (("train", self.train, every), ("val", self.val, 1)):
            total = n_targets = 0.0
            for batch in list(batches.in_order())[::step]:
                n = int((batch.target != PADDING).sum())
                with self._autocast:
                    total += n * self.model(*self._on_device(batch))[1].item()
                n_targets += n
            losses[name] = total / n_targets
        self.model.train()
        return losses

    def _evaluate_and_save(self, log: RunLog) -> None:
        self._check_finite()
        losses = self.evaluate()
        log.evaluation(
            self.iter_num, losses["train"], losses["val"], self.learning_rate(self.iter_num), None
        )
        self.console.print(
            f"step {self.iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        )
        if not math.isfinite(losses["val"]):
            self._step.not_finite.fill_(1.0)
            self._check_finite()
        improved = losses["val"] < self.best_val_loss
        if improved:
            self.best_val_loss = losses["val"]
        if self.iter_num > 0:
            self._save(self.config.out_dir / LAST)
            if improved:
                ckpt.publish(self.config.out_dir / LAST, self.config.out_dir / ckpt.BEST)

    def _save(self, path: Path) -> None:
        if isinstance(self.optimizer, MasterAdamW):
            weights = self.optimizer.master_state_dict()
        else:
            weights = self.model.state_dict()
        state: dict[str, Any] = {
            "model": weights,
            **model_entries(self.model, self.tokenizers),
            "optimizer": saved_state(self.optimizer),
            "iter_num": self.iter_num,
            "best_val_loss": self.best_val_loss,
            "generators": random_states(self.device),
            "scaler": self.scaler.state_dict(),
            "config": _plain(self.config),
            "data_fingerprint": self._fingerprint,
        }
        ckpt.save(state, path)


def _plain(config: TranslationConfig) -> dict[str, Any]:
    """As a checkpoint holds it."""
    values = asdict(config).items()
    return {key: str(value) if isinstance(value, Path) else value for key, value in values}
