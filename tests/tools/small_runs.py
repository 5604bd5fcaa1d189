"""A data set and a configuration small enough that a whole training run takes a second."""

import contextlib
import io
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

from fastgpt.data.prepare import characters_of, prepare
from fastgpt.data.sources import TextSource
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder
from fastgpt.training.config import TrainConfig
from fastgpt.training.run import Run
from fastgpt.training.trainer import Trainer

HANGS = 600  # seconds after which a process is stuck, even on a busy machine
TEXT = "".join(f"{n} times {n + 1} is {n * (n + 1)};\n" for n in range(400))


def data_set(root: Path, text: str = TEXT) -> Path:
    """Write a character-level data set to ``root/small``, replacing an earlier one."""
    shutil.rmtree(root / "small", ignore_errors=True)
    source = TextSource(text)
    prepare(source, characters_of(source), root / "small")
    return root / "small"


def small_keys(root: Path, **changes: Any) -> dict[str, Any]:
    """Configuration keys of a run on that data set that writes to ``root/out``."""
    return {
        "data_root": str(root),
        "dataset": "small",
        "out_dir": str(root / "out"),
        "eval_interval": 10,
        "eval_iters": 2,
        "log_interval": 5,
        "gradient_accumulation_steps": 2,
        "batch_size": 4,
        "block_size": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 16,
        "dropout": 0.1,
        "learning_rate": 1e-2,
        "max_iters": 20,
        "lr_decay_iters": 20,
        "warmup_iters": 4,
        "min_lr": 1e-3,
        "device": "cpu",
        **changes,
    }


def small_config(root: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**small_keys(root, **changes))


def arguments(keys: dict[str, Any]) -> list[str]:
    """Keys as command-line arguments."""
    return [f"--{key}={value}" for key, value in keys.items()]


def quiet() -> Console:
    return Console(file=io.StringIO())


def trained(root: Path, **changes: Any) -> Trainer:
    trainer = Trainer(small_config(root, **changes), quiet())
    trainer.run()
    return trainer


@contextlib.contextmanager
def interrupted(kind: type[Run], iteration: int) -> Iterator[None]:
    """Send Ctrl-C to runs of this class at the beginning of an update."""
    update = kind._update

    def with_signal(run: Any, learning_rate: float) -> Any:
        if run.iter_num == iteration:
            signal.raise_signal(signal.SIGINT)
        return update(run, learning_rate)

    with mock.patch.object(kind, "_update", with_signal):
        yield


def state_of(root: Path) -> dict[str, Any]:
    """The contents of the newest checkpoint."""
    return ckpt.load(checkpoint_folder.saved(root / "out")[0])


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Assert that two nests of dicts, lists and tensors are equal, bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert a == b, where
