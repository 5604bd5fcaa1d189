"""``fastgpt train`` in processes of its own, to be stopped or killed."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from fastgpt.__main__ import main
from fastgpt.training.trainer import Trainer
from tests.tools.forked import Forked
from tests.tools.small_runs import arguments


def command(keys: dict[str, Any]) -> list[str]:
    return ["train", "--preset=gpt2", *arguments(keys)]


def started(keys: dict[str, Any], processes: int = 1) -> Forked:
    return Forked(main, command(keys), processes=processes)


def killed_once(argv: list[str]) -> int:
    """fastgpt, of which the last process is killed before iteration 31, but only the first time."""
    update = Trainer._update

    def killed(self: Trainer, learning_rate: float) -> Any:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and self.world.rank == self.world.size - 1 and self.iter_num == 31:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, learning_rate)

    Trainer._update = killed  # type: ignore[method-assign]
    return main(argv)


def interrupted_one_by_one(first: int, argv: list[str]) -> int:
    """fastgpt, of which the process ``first`` gets SIGTERM in iteration 11, every other one only
    when it saves."""
    update, save = Trainer._update, Trainer._save

    def first_updates(self: Trainer, learning_rate: float) -> Any:
        if self.world.rank == first and self.iter_num == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, learning_rate)

    def other_saves(self: Trainer, publish: bool) -> Path | None:
        if self.world.rank != first and self.iter_num == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return save(self, publish)

    Trainer._update, Trainer._save = first_updates, other_saves  # type: ignore[method-assign]
    return main(argv)


if __name__ == "__main__":
    sys.exit(killed_once(sys.argv[1:]))
