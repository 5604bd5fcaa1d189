"""The processes of one training run, as torchrun starts them: one a GPU, on one machine or several.

    torchrun --nproc_per_node=8 -m fastgpt train config/train_gpt2.py

Each has a rank and, from torchrun's environment, knows how to find the others. Alone, a process is
rank 0 of 1, and nothing here communicates.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Which process this is, and of how many.

    Attributes:
        rank: in [0, size); rank 0 alone writes files and speaks.
        local_rank: which of this machine's: the number of its GPU.
        size: the number of processes.
        restarts: how often torchrun has started the processes again after a failure.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    restarts: int = 0

    @classmethod
    def from_environment(cls) -> "World":
        """What torchrun's variables say; one process alone without them.

        Raises:
            ValueError: WORLD_SIZE is set above 1, but RANK, LOCAL_RANK, MASTER_ADDR or MASTER_PORT
                is not; or one of the numbers is none.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls(restarts=_number("TORCHELASTIC_RESTART_COUNT", "0"))
        names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise ValueError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} needs {', '.join(missing)} too: start "
                "several processes with torchrun --nproc_per_node=N -m fastgpt train"
            )
        return cls(
            _number("RANK"),
            _number("LOCAL_RANK"),
            _number("WORLD_SIZE"),
            _number("TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def device(self, asked: torch.device) -> torch.device:
        """``asked``, or of several GPUs this process's own."""
        several = self.size > 1 and asked.type == "cuda"
        return torch.device("cuda", self.local_rank) if several else asked

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def connected(self, device: torch.device, backend: str) -> Iterator[None]:
        """The processes can reach each other inside. ``backend`` moves the tensors on GPUs ("nccl",
        say); gloo those on the CPU.
        """
        if self.size == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = f"cpu:gloo,cuda:{backend}"
        else:
            backend = "gloo"
        store, _, _ = next(dist.rendezvous("env://"))
        # torchrun keeps its store through a restart, with the addresses of processes that are gone
        # in it. Agents of several machines count restarts each for itself.
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            store = dist.PrefixStore(f"restart-{self.restarts}", store)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
        try:
            yield
            # All end together. A thread of gloo's may still be dropping the tensors of the last
            # collective; if Python ends first, it stops that thread inside C++, which aborts.
            self.barrier()
        finally:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """For all others to come here."""
        if self.size > 1:
            dist.barrier()

    def all_reduce(self, x: Tensor) -> Tensor:
        """``x`` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether any process says so. The answer is the same in all."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag))))  # on the host: no GPU is waited for

    def all_gather_object(self, item: Any) -> list[Any]:
        """Every process's item, in the order of the ranks."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items


ALONE = World()


def _number(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    if value is None or not value.isdecimal():
        raise ValueError(f"{name} must be a number from 0, got {value!r}")
    return int(value)
