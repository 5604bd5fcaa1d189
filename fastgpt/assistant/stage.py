"""What the reward model's run and reinforcement learning share: keys, folder, loop, checkpoint.

A run starts from the checkpoint of another one and writes ``log.jsonl`` and ``ckpt.pt``. An update
is made of ``gradient_accumulation_steps`` micro-batches, whose losses count by their tokens or
pairs; the learning rate falls linearly to 0.
"""

import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fastgpt._files import check_folder, exclusive_lock
from fastgpt._progress import PlainConsole, progress_bar
from fastgpt.data.file_formats import read_json_lines
from fastgpt.devices import (
    autocast,
    random_states,
    resolve_device,
    resolve_dtype,
    set_random_states,
)
from fastgpt.model import GPT
from fastgpt.tokenizer import ChatTokenizer, packed
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder
from fastgpt.training.config import Dtype, TrainConfig
from fastgpt.training.init_from import shape_of
from fastgpt.training.log import LOG, RunLog
from fastgpt.training.optimizer import MasterAdamW, saved_state
from fastgpt.training.progress import interrupts
from fastgpt.training.step import Step

if TYPE_CHECKING:
    from rich.console import Console

Figures = dict[str, float]
_T = TypeVar("_T")

HELD_OUT = 10  # of so many prompts, one is held out


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    # Folder of the model to start from: a run of `fastgpt train` on dialogues.
    init_from: str
    # JSONL file.
    dataset: str
    # JSONL file of what is held out to evaluate on; without one, every tenth prompt is.
    val_dataset: str = ""
    # Folder of ckpt.pt and log.jsonl.
    out_dir: str
    # Go on with the run in out_dir, which was stopped. Give the options that it had.
    resume: bool = False
    # Updates.
    max_iters: int = 200
    # Items of the data set in a micro-batch.
    batch_size: int
    # Micro-batches summed up into one update.
    gradient_accumulation_steps: int = 1
    # Learning rate of AdamW at first; it falls linearly to 0.
    learning_rate: float = 1e-4
    # Weight decay of the matrices; vectors are not decayed.
    weight_decay: float = 0.0
    # Largest gradient norm; 0 turns clipping off.
    grad_clip: float = 1.0
    # Updates between two evaluations; ckpt.pt is written there.
    eval_interval: int = 50
    # Updates between two reports.
    log_interval: int = 10
    # Seed of the batches and the draws.
    seed: int = 1337
    # cuda, cuda:N, cpu, mps, or auto (cuda where there is one, else cpu).
    device: str = "auto"
    # auto is bfloat16 on a GPU that has it, float16 on an older one, float32 elsewhere.
    dtype: Dtype = "auto"


def loaded(folder: str, key: str) -> tuple[ckpt.Checkpoint, ChatTokenizer, Path]:
    """The checkpoint in the folder of the option ``key``, its tokenizer and its path.

    Raises FileNotFoundError, NotADirectoryError or ValueError that name the folder or file.
    """
    if not Path(folder).exists():
        raise FileNotFoundError(f"{key} must be the folder of a run, but there is no {folder}")
    path, _ = checkpoint_folder.for_sampling(Path(folder))
    checkpoint = ckpt.load(path)
    tokenizer = ckpt.tokenizer_of(checkpoint, path)
    if not isinstance(tokenizer, ChatTokenizer):
        raise ValueError(
            f"{key} must be the folder of a model trained on dialogues, but {path} knows no tokens "
            f"for them ({tokenizer.name})"
        )
    return checkpoint, tokenizer, path


def loaded_gpt(folder: str) -> tuple[GPT, ChatTokenizer]:
    """The GPT of ``init_from``, without dropout, and its tokenizer. Raises as ``loaded``, and
    ValueError for a model of another kind.
    """
    checkpoint, tokenizer, path = loaded(folder, "init_from")
    model = ckpt.build_model(checkpoint, path, dropout=0.0)
    if not isinstance(model, GPT):
        raise ValueError(f"init_from must be the folder of a GPT, but {path} is a bigram model")
    return model, tokenizer


def read_lines(path: str, key: str, read: Callable[[dict[str, Any]], _T]) -> list[_T]:
    """What ``read`` makes of each object of a JSONL file.

    Raises FileNotFoundError naming the option ``key``; ValueError naming file and line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key} must be a JSONL file, but there is no file {path}")
    rows = []
    for row, where, _ in read_json_lines(Path(path)):
        try:
            rows.append(read(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return rows


def held_out(
    config: StageConfig, read: Callable[[dict[str, Any]], _T], prompt: Callable[[_T], Hashable]
) -> tuple[list[_T], list[_T]]:
    """What to train on, and what is held out: the rows of ``val_dataset`` or, without one, those
    of every tenth prompt.

    Raises as ``read_lines``, and ValueError if there are too few prompts.
    """
    rows = read_lines(config.dataset, "dataset", read)
    numbers: dict[Hashable, int] = {}
    for row in rows:
        numbers.setdefault(prompt(row), len(numbers) + 1)
    least = 1 if config.val_dataset else HELD_OUT
    if len(numbers) < least:
        raise ValueError(
            f"dataset must hold at least {least} different prompts, but {config.dataset} has "
            f"{len(numbers)}"
        )
    if config.val_dataset:
        val = read_lines(config.val_dataset, "val_dataset", read)
        if not val:
            raise ValueError(f"val_dataset must hold a prompt, but {config.val_dataset} is empty")
        return rows, val
    parts: tuple[list[_T], list[_T]] = [], []
    for row in rows:
        parts[numbers[prompt(row)] % HELD_OUT == 0].append(row)
    return parts


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Rows of any lengths as int64 (B, T), padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


class Order:
    """The order of ``count`` things: each epoch is a new permutation, drawn from the seed.
    ``done`` of them are left out.
    """

    def __init__(self, count: int, seed: int, done: int) -> None:
        self._count = count
        self._generator = torch.Generator().manual_seed(seed)
        self._left: list[int] = []
        self.next(done)

    def next(self, number: int) -> list[int]:
        while len(self._left) < number:
            self._left += torch.randperm(self._count, generator=self._generator).tolist()
        taken, self._left = self._left[:number], self._left[number:]
        return taken


class Stage:
    """A run that trains ``model`` by the loss module around it. See ``training.step.Step`` for what
    that gets.

    Raises ValueError or TypeError naming the key of the config, NotADirectoryError if ``out_dir``
    is a file; with ``resume`` FileNotFoundError or ValueError without a usable checkpoint there.
    """

    def __init__(
        self,
        config: StageConfig,
        model: GPT,
        loss: Callable[[Any], nn.Module],
        tokenizer: ChatTokenizer,
        console: "Console | PlainConsole",
    ) -> None:
        self._train_config = TrainConfig(
            **{f: v for f, v in asdict(config).items() if f in TrainConfig.__dataclass_fields__},
            **shape_of(model),
            decay_lr=False,
        )
        self.config = config
        self.out_dir = Path(config.out_dir)
        self.console = console
        check_folder(self.out_dir)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.autocast = autocast(self.device, self.dtype)
        self._tokenizer = tokenizer
        self._log = RunLog(self._train_config)
        torch.manual_seed(config.seed)
        saved = self._load_into(model) if config.resume else None
        self.model = model.to(self.device).eval()
        self._optimizer = self._build_optimizer()
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.iteration = 0
        if saved is not None:
            self._restore(saved)
        self.loss: Any = loss(self.model)
        self._step = Step(
            self.loss,
            self._optimizer,
            self.device,
            micro_batches=config.gradient_accumulation_steps,
            grad_clip=config.grad_clip,
            autocast=self.autocast,
            scaler=self._scaler,
        )

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config, betas = self._train_config, (0.9, 0.95)
        if self.dtype == torch.bfloat16:
            return MasterAdamW(
                self.model, self.dtype, config.weight_decay, config.learning_rate, betas
            )
        return self.model.configure_optimizers(
            config.weight_decay, config.learning_rate, betas, self.device.type
        )

    def _load_into(self, model: GPT) -> ckpt.Checkpoint:
        """The checkpoint in ``out_dir``, and its weights into ``model``."""
        path = self.out_dir / ckpt.BEST
        saved = ckpt.load(path, ckpt.FOR_RESUMING)
        try:
            model.load_state_dict(saved["model"])
        except RuntimeError as error:
            raise ValueError(f"resume: {path} is of another model than init_from") from error
        return saved

    def _restore(self, saved: ckpt.Checkpoint) -> None:
        state, own = saved["optimizer"], ckpt.own_state(saved)
        for old, new in zip(state["param_groups"], self._optimizer.param_groups, strict=True):
            old.update({key: value for key, value in new.items() if key != "params"})
        self._optimizer.load_state_dict(state)
        set_random_states(own["generators"], self.device)
        if self._scaler.is_enabled() and own["scaler"]:
            self._scaler.load_state_dict(own["scaler"])
        self.iteration = int(saved["iter_num"])
        self.console.print(f"going on from {self.out_dir} at iteration {self.iteration}")

    def learning_rate(self) -> float:
        return self.config.learning_rate * (1.0 - self.iteration / self.config.max_iters)

    def step(self, batches: Sequence[Any]) -> float:
        """One update; its mean loss. FloatingPointError if that is not finite."""
        loss = self._step(batches, self.learning_rate()).item()
        if self._step.not_finite:
            raise FloatingPointError(
                f"the loss or its gradient is not finite at iteration {self.iteration}: try a "
                f"smaller learning_rate than {self.config.learning_rate}"
            )
        return loss

    def run(
        self,
        update: Callable[[], tuple[Figures, int]],
        evaluate: Callable[[], Figures],
        stop: Callable[[Figures], str | None] = lambda figures: None,
    ) -> None:
        """Make ``max_iters`` updates. ``update()`` makes one and returns its figures and the number
        of its tokens; ``evaluate()`` those of the held-out prompts; ``stop(figures)`` a reason to
        end the run, or None. All are logged; ``ckpt.pt`` is written with each evaluation.

        Ctrl-C ends the update in progress, saves and raises KeyboardInterrupt.
        """
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.out_dir):
            if not self.config.resume:
                moved = checkpoint_folder.archive_previous_run(self.out_dir, (LOG,))
                if moved:
                    self.console.print(f"an earlier run's checkpoint and log are now in {moved}")
            with self._log.opened(self._train_config, self.iteration), interrupts() as interrupted:
                reason = self._updates(update, evaluate, stop, interrupted)
                if interrupted.is_set():
                    self.console.print(
                        f"stopped before iteration {self.iteration}; saved {self._save()}. Go on "
                        "with the same command and --resume"
                    )
                    raise KeyboardInterrupt
                if reason is not None:
                    self.console.print(f"ended before iteration {self.iteration}: {reason}")
                self._evaluate(evaluate)
                self._save()

    def _updates(
        self,
        update: Callable[[], tuple[Figures, int]],
        evaluate: Callable[[], Figures],
        stop: Callable[[Figures], str | None],
        interrupted: threading.Event,
    ) -> str | None:
        """Those that are left; returns the reason of ``stop``."""
        config = self.config
        tokens, since = 0, time.perf_counter()
        with progress_bar("iteration") as show:
            while self.iteration < config.max_iters and not interrupted.is_set():
                if self.iteration % config.eval_interval == 0:
                    self._evaluate(evaluate)
                    if self.iteration > 0:
                        self._save()
                    tokens, since = 0, time.perf_counter()
                learning_rate = self.learning_rate()
                figures, n_tokens = update()
                tokens += n_tokens
                reason = stop(figures)
                if self.iteration % config.log_interval == 0 or reason is not None:
                    speed = tokens / (time.perf_counter() - since)
                    tokens, since = 0, time.perf_counter()
                    self._log.write(
                        self.iteration, **figures, lr=learning_rate, tokens_per_second=speed
                    )
                    self.console.print(
                        f"iter {self.iteration}: {_shown(figures)}, {speed:,.0f} tokens/s"
                    )
                self.iteration += 1
                show(self.iteration / config.max_iters, _shown(figures))
                if reason is not None:
                    return reason
        return None

    def _evaluate(self, evaluate: Callable[[], Figures]) -> None:
        figures = evaluate()
        self.console.print(f"step {self.iteration}: {_shown(figures)}")
        self._log.write(self.iteration, **{f"val/{key}": v for key, v in figures.items()})

    def _save(self) -> Path:
        path = self.out_dir / ckpt.BEST
        optimizer = self._optimizer
        weights = (
            optimizer.master_state_dict()
            if isinstance(optimizer, MasterAdamW)
            else self.model.state_dict()
        )
        state = {
            "model": weights,
            "optimizer": saved_state(optimizer),
            "model_args": ckpt.model_args(self.model),
            "iter_num": self.iteration,
            "best_val_loss": torch.tensor(math.inf),
            "config": asdict(self._train_config),
            "fastgpt": {
                **ckpt.kind_and_gelu(self.model),
                **packed(self._tokenizer),
                "generators": random_states(self.device),
                "scaler": self._scaler.state_dict(),
            },
        }
        ckpt.save(state, path)
        return path


def _shown(figures: Figures) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
