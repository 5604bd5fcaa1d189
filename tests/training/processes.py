"""``fastgpt train`` in separate processes, to be stopped or killed."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fastgpt.__main__ import main
from fastgpt.training.trainer import Trainer
from tests.tools.forked import Forked
from tests.tools.small_runs import arguments


def command(keys: dict[str, Any]) -> list[str]:
    return ["train", "--preset=gpt2", *arguments(keys)]


def started(keys: dict[str, Any], processes: int = 1) -> Forked:
    return Forked(main, command(keys), processes=processes)


def killed_once(argv: list[str]) -> int:
    """Run fastgpt; the last rank is killed before iteration 31 unless torchrun restarted it."""
    update = Trainer._update

    def killed(self: Trainer, learning_rate: float) -> Any:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if first and self.world.rank == self.world.size - 1 and self.iter_num == 31:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, learning_rate)

    Trainer._update = killed  # type: ignore[method-assign]
    return main(argv)


def interrupted_one_by_one(first: int, argv: list[str]) -> int:
    """Run fastgpt; rank ``first`` gets SIGTERM in iteration 11, the others only when they save. A
    process that ends before all have saved aborts."""
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
    _abort_without_barrier()
    return main(argv)


def _abort_without_barrier() -> None:
    """Abort if the last collective before the process group is destroyed is not a barrier: torchrun
    would then end ranks that may still be saving, which would be seen only by chance."""
    last = ""

    def noted(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            last = name
            return collective(*args, **kwargs)

        return call

    for name in ("all_reduce", "all_gather_object", "barrier", "broadcast"):
        setattr(dist, name, noted(name, getattr(dist, name)))
    destroy = dist.destroy_process_group

    def checked() -> None:
        if last != "barrier":
            print(f"the process group ends behind {last}")
            os.abort()
        destroy()

    setattr(dist, "destroy_process_group", checked)  # noqa: B010


def one_interrupted_twice(which: int, at: str, argv: list[str]) -> int:
    """Run fastgpt; all ranks get SIGINT in iteration 11, and rank ``which`` a second one there
    (``at`` is "update") or when it saves ("save")."""
    update, save = Trainer._update, Trainer._save

    def interrupted(self: Trainer, learning_rate: float) -> Any:
        if self.iter_num == 11:
            os.kill(os.getpid(), signal.SIGINT)
            if self.world.rank == which and at == "update":
                os.kill(os.getpid(), signal.SIGINT)
        return update(self, learning_rate)

    def saves(self: Trainer, publish: bool) -> Path | None:
        if self.world.rank == which and self.iter_num == 12:
            os.kill(os.getpid(), signal.SIGINT)
        return save(self, publish)

    Trainer._update, Trainer._save = interrupted, saves  # type: ignore[method-assign]
    return main(argv)


if __name__ == "__main__":
    sys.exit(killed_once(sys.argv[1:]))
