"""Base class of reward training and reinforcement learning: keys, data, order, checkpoint.

A run starts from the checkpoint of another run and writes ``log.jsonl`` and ``ckpt.pt``. An update
has ``gradient_accumulation_steps`` micro-batches, whose losses are weighted by their number of
tokens or pairs. The learning rate decreases linearly to 0.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fastgpt._files import check_folder
from fastgpt._progress import AnyConsole
from fastgpt.data.file_formats import naming, read_json_lines
from fastgpt.model import GPT
from fastgpt.tokenizer import ChatTokenizer
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder
from fastgpt.training.config import COUNT, Dtype, TrainConfig, check_limits
from fastgpt.training.init_from import shape_of
from fastgpt.training.run import Run

_T = TypeVar("_T")

HELD_OUT = 10  # one in ten prompts is held out


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    # Folder of the model to start from: a run of `fastgpt train` on dialogues.
    init_from: str
    # JSONL file.
    dataset: str
    # JSONL file of held-out data for evaluation; without one, every tenth prompt is held out.
    val_dataset: str = ""
    # Folder for ckpt.pt and log.jsonl.
    out_dir: str
    # Resume the stopped run in out_dir. Give the same options as before.
    resume: bool = False
    # Number of updates.
    max_iters: int = 200
    # Items of the data set per micro-batch.
    batch_size: int
    # Micro-batches per update.
    gradient_accumulation_steps: int = 1
    # Initial learning rate of AdamW; it decreases linearly to 0.
    learning_rate: float = 1e-4
    # Weight decay of the matrices; vectors are not decayed.
    weight_decay: float = 0.0
    # Maximum gradient norm; 0 disables clipping.
    grad_clip: float = 1.0
    # Updates between two evaluations; each also writes ckpt.pt.
    eval_interval: int = 50
    # Updates between two reports.
    log_interval: int = 10
    # Seed for the batches and for sampling.
    seed: int = 1337
    # cuda, cuda:N, cpu, mps, or auto (cuda if available, else cpu).
    device: str = "auto"
    # auto: bfloat16 on a GPU that supports it, float16 on an older GPU, float32 elsewhere.
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        check_limits(self, max_iters=COUNT)


def loaded(folder: str, key: str) -> tuple[ckpt.Checkpoint, ChatTokenizer, Path]:
    """The checkpoint in ``folder``, its tokenizer and its path. ``key``: the option, for errors.

    Raises FileNotFoundError, NotADirectoryError or ValueError naming the folder or file.
    """
    if not Path(folder).exists():
        raise FileNotFoundError(f"{key} must be the folder of a run, but there is no {folder}")
    check_folder(Path(folder), f"{key} must be the folder of a run")
    path, _ = checkpoint_folder.for_sampling(Path(folder))
    checkpoint = ckpt.load(path)
    tokenizer = ckpt.tokenizer_of(checkpoint, path)
    if not isinstance(tokenizer, ChatTokenizer):
        raise ValueError(
            f"{key} must be the folder of a model trained on dialogues, but {path} has no tokens "
            f"for them ({tokenizer.name})"
        )
    return checkpoint, tokenizer, path


def loaded_gpt(folder: str) -> tuple[GPT, ChatTokenizer]:
    """The GPT of ``init_from``, without dropout, and its tokenizer. Raises like ``loaded``, and
    ValueError for a model of another kind.
    """
    checkpoint, tokenizer, path = loaded(folder, "init_from")
    model = ckpt.build_model(checkpoint, path, dropout=0.0)
    if not isinstance(model, GPT):
        raise ValueError(f"init_from must be the folder of a GPT, but {path} is a bigram model")
    return model, tokenizer


def read_lines(path: str, key: str, read: Callable[[dict[str, Any]], _T]) -> list[_T]:
    """``read`` applied to each object of a JSONL file.

    Raises FileNotFoundError naming the option ``key``, ValueError naming file and line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{key} must be a JSONL file, but there is no file {path}")
    rows = []
    for row, where, _ in read_json_lines(Path(path)):
        with naming(where):
            rows.append(read(row))
    return rows


def held_out(
    config: StageConfig, read: Callable[[dict[str, Any]], _T], prompt: Callable[[_T], Hashable]
) -> tuple[list[_T], list[_T]]:
    """The rows to train on and the held-out ones, which are those of ``val_dataset`` or, without
    it, of every tenth prompt.

    Raises like ``read_lines``, and ValueError if there are too few prompts.
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


def order(count: int, seed: int, done: int) -> Iterator[int]:
    """An endless sequence of indices below ``count``: each epoch is a new permutation, drawn with
    ``seed``. The first ``done`` indices are skipped.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(count, generator=generator).tolist() for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), done, None)


class Stage(Run):
    """A run that trains ``model`` on the rows ``train``. ``loss`` wraps the model in the module
    that ``training.step.Step`` calls.

    Raises ValueError or TypeError naming the key of the config, NotADirectoryError if ``out_dir``
    is a file; with ``resume``, FileNotFoundError or ValueError without a usable checkpoint.
    """

    model: GPT

    def __init__(
        self,
        config: StageConfig,
        model: GPT,
        loss: Callable[[Any], nn.Module],
        tokenizer: ChatTokenizer,
        train: Sequence[Any],
        console: AnyConsole,
    ) -> None:
        self._train_config = TrainConfig(
            **{f: v for f, v in asdict(config).items() if f in TrainConfig.__dataclass_fields__},
            **shape_of(model),
            decay_lr=False,
        )
        super().__init__(config, console)
        self._tokenizer = tokenizer
        saved, path = None, self.out_dir / ckpt.BEST
        if config.resume:
            saved = ckpt.load(path, ckpt.FOR_RESUMING)
            try:
                model.load_state_dict(saved["model"])
            except RuntimeError as error:
                raise ValueError(f"resume: {path} is of another model than init_from") from error
        self.model = model.to(self.device).eval()
        self.optimizer = self._build_optimizer(
            self.model, config.weight_decay, config.learning_rate, (0.9, 0.95)
        )
        self._build_step(loss(self.model), config.gradient_accumulation_steps)
        if saved is not None:
            self._restore(saved, ckpt.own_state(saved), path)
            console.print(f"resuming from {self.out_dir} at iteration {self.iter_num}")
        self.train = train
        self._n_rows = config.batch_size * config.gradient_accumulation_steps
        self._order = order(len(train), config.seed, self._n_rows * self.iter_num)

    def _next_rows(self) -> list[Any]:
        """The rows of ``train`` for the next update."""
        return [self.train[i] for i in itertools.islice(self._order, self._n_rows)]

    def learning_rate(self, iteration: int) -> float:
        learning_rate: float = self.config.learning_rate
        return learning_rate * (1.0 - iteration / self.config.max_iters)

    def _save(self, publish: bool) -> Path:
        path = self.out_dir / ckpt.BEST
        ckpt.save(self._language_model_state(self._train_config, self._tokenizer), path)
        return path
