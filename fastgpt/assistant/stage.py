"""What the reward model's run and reinforcement learning share: keys, data, order, checkpoint.

A run starts from the checkpoint of another one and writes ``log.jsonl`` and ``ckpt.pt``. An update
is made of ``gradient_accumulation_steps`` micro-batches, whose losses count by their tokens or
pairs; the learning rate falls linearly to 0.
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

    def __post_init__(self) -> None:
        check_limits(self, max_iters=COUNT)


def loaded(folder: str, key: str) -> tuple[ckpt.Checkpoint, ChatTokenizer, Path]:
    """The checkpoint in the folder of the option ``key``, its tokenizer and its path.

    Raises FileNotFoundError, NotADirectoryError or ValueError that name the folder or file.
    """
    if not Path(folder).exists():
        raise FileNotFoundError(f"{key} must be the folder of a run, but there is no {folder}")
    check_folder(Path(folder), f"{key} must be the folder of a run")
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
        with naming(where):
            rows.append(read(row))
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


def order(count: int, seed: int, done: int) -> Iterator[int]:
    """Numbers below ``count`` without end: each epoch is a new permutation, drawn from the seed.
    The first ``done`` of them are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = (torch.randperm(count, generator=generator).tolist() for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), done, None)


class Stage(Run):
    """A run that trains ``model`` on the rows ``train`` by the loss module around it. See
    ``training.step.Step`` for what that gets.

    Raises ValueError or TypeError naming the key of the config, NotADirectoryError if ``out_dir``
    is a file; with ``resume`` FileNotFoundError or ValueError without a usable checkpoint there.
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
            console.print(f"going on from {self.out_dir} at iteration {self.iter_num}")
        self.train = train
        self._n_rows = config.batch_size * config.gradient_accumulation_steps
        self._order = order(len(train), config.seed, self._n_rows * self.iter_num)

    def _next_rows(self) -> list[Any]:
        """Of ``train``, for an update."""
        return [self.train[i] for i in itertools.islice(self._order, self._n_rows)]

    def learning_rate(self, iteration: int) -> float:
        learning_rate: float = self.config.learning_rate
        return learning_rate * (1.0 - iteration / self.config.max_iters)

    def _save(self, publish: bool) -> Path:
        path = self.out_dir / ckpt.BEST
        ckpt.save(self._language_model_state(self._train_config, self._tokenizer), path)
        return path
