"""A run's log: ``log.jsonl`` always, TensorBoard and Weights & Biases on request.

Each line of ``log.jsonl`` is a JSON object with ``iter``, the number of an update, and ``time`` in
seconds since 1970. A report adds ``loss``, ``lr``, ``tokens_per_second`` and, on a GPU with a known
peak, ``mfu`` in percent; an evaluation adds nanoGPT's keys ``train/loss``, ``val/loss``, ``lr``,
``mfu``. Values that are not finite are null.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

from fastgpt._files import atomic_write, parsed_json, writing
from fastgpt._optional import optional
from fastgpt.training.config import TrainConfig

LOG, TENSORBOARD = "log.jsonl", "tensorboard"

Row = dict[str, Any]


class RunLog:
    """Writes a run's metrics.

        log = RunLog(config)
        with log.opened(config, first_iter=0, evaluates=True):
            log.write(0, {"train/loss": 4.2, "val/loss": 4.2}, to_wandb=True)
            log.write(0, {"loss": 4.2, "lr": 1e-3, "tokens_per_second": 1e5})

    The constructor raises ImportError if a package that the config asks for is not installed.
    """

    def __init__(self, config: Any) -> None:
        def library(key: str, module: str) -> Any:
            wanted = getattr(config, key, False)  # only TrainConfig has these keys
            return optional(module, f"{key}=True", "log") if wanted else None

        self._wandb = library("wandb_log", "wandb")
        self._tensorboard = library("tensorboard_log", "torch.utils.tensorboard")
        self._file: FileIO | None = None
        self._writer: Any = None

    @contextmanager
    def opened(self, config: Any, first_iter: int, evaluates: bool) -> Iterator[None]:
        """Within the block, write to the folder ``out_dir``, which must exist.

        Appends to an existing log. Drops its rows from iteration ``first_iter`` on, which will run
        again; keeps the evaluation at ``first_iter`` unless the run begins with one
        (``evaluates``). Raises ValueError if the log cannot be read, or if wandb fails, for example
        without a login.
        """
        out_dir = Path(config.out_dir)
        path = out_dir / LOG
        if path.exists():
            _drop_from(path, first_iter, keep_evaluation=not evaluates)
        if self._wandb is not None:
            _start(self._wandb, config)
        if self._tensorboard is not None:
            folder = str(out_dir / TENSORBOARD)
            self._writer = self._tensorboard.SummaryWriter(folder, purge_step=first_iter)
        with open(path, "ab", buffering=0) as self._file:
            try:
                yield
            finally:
                if self._writer is not None:
                    self._writer.close()
                if self._wandb is not None:
                    self._wandb.finish()

    def write(self, iteration: int, figures: Mapping[str, float], to_wandb: bool = False) -> None:
        """Write a row of metrics of the update ``iteration``, or of the evaluation before it."""
        row: Row = {"iter": iteration, **figures}
        assert self._file is not None, "opened() comes first"
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        line = json.dumps({**finite, "time": round(time.time(), 3)}, allow_nan=False)
        data = f"{line}\n".encode()
        with writing(Path(self._file.name)):
            while data:  # unbuffered: a full disk may accept only a part of it
                data = data[self._file.write(data) :]
        if self._writer is not None:
            for key, value in row.items():
                if key != "iter":
                    self._writer.add_scalar(key, value, row["iter"])
            self._writer.flush()
        if self._wandb is not None and to_wandb:
            self._wandb.log(row)


def read(path: Path) -> list[Row]:
    """The rows of a ``log.jsonl``, without an incomplete last line that a crash may leave.

    Raises FileNotFoundError, or ValueError naming file and line if a line is not a row.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: `fastgpt train` writes it")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = parsed_json(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("iter"), int):
            raise ValueError(f"{path}:{number}: must be an object with an integer 'iter'")
        rows.append(row)
    return rows


def _drop_from(path: Path, first_iter: int, keep_evaluation: bool) -> None:
    """Keep the rows before ``first_iter``, and its evaluation if that will not run again."""

    def is_kept(row: Row) -> bool:
        of_evaluation = any(key.startswith("val/") for key in row)
        last = first_iter if keep_evaluation and of_evaluation else first_iter - 1
        return row["iter"] <= last

    kept = filter(is_kept, read(path))
    with atomic_write(path) as file:
        file.writelines((json.dumps(row) + "\n").encode() for row in kept)


def _start(wandb: Any, config: TrainConfig) -> None:
    try:
        wandb.init(project=config.wandb_project, name=config.wandb_run_name, config=asdict(config))
    except wandb.Error as error:
        raise ValueError(
            f"wandb_log=True: {str(error).splitlines()[0]} Set WANDB_MODE=offline in the "
            "environment to log on this machine only"
        ) from error
