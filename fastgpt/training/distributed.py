"""Distributed runs, started by torchrun: one process per GPU, on one or several machines.

    torchrun --nproc_per_node=8 -m fastgpt train config/train_gpt2.py

Each process has a rank and finds the others by torchrun's environment variables. A single process
is rank 0 of 1, and all functions here work without communication.
"""

import ctypes
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
    """This process's rank and the number of processes.

    Attributes:
        rank: in [0, size); only rank 0 writes files and prints.
        local_rank: the rank among the processes of this machine, and the index of its GPU.
        size: the number of processes.
        restarts: how often torchrun has restarted the processes after a failure.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    restarts: int = 0

    @classmethod
    def from_environment(cls) -> "World":
        """Read torchrun's environment variables; without them, a single process.

        Raises:
            ValueError: WORLD_SIZE is above 1, but RANK, LOCAL_RANK, MASTER_ADDR or MASTER_PORT is
                not set; or a number is malformed.
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
        """``asked``; in a distributed run on GPUs, this process's own GPU."""
        several = self.size > 1 and asked.type == "cuda"
        return torch.device("cuda", self.local_rank) if several else asked

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def connected(self, device: torch.device, backend: str) -> Iterator[None]:
        """Within the block, the process group is initialized. ``backend`` (such as "nccl") is used
        for tensors on GPUs, gloo for those on the CPU.

        The block ends with a barrier. Call ``barrier`` also before an exception that all ranks
        raise: a thread of gloo may still be freeing the tensors of the last collective, and aborts
        if Python exits meanwhile; and torchrun kills the other ranks as soon as one has failed.

        Raises ConnectionError if the ranks cannot connect, or one ends before the others.
        """
        if self.size == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = f"cpu:gloo,cuda:{backend}"
        else:
            backend = "gloo"
        with _failures_in_one_line(self.rank):
            store, _, _ = next(dist.rendezvous("env://"))
            # torchrun's store outlives a restart and still has the addresses of the old processes,
            # so add a prefix. Not on several machines, where each agent counts its own restarts.
            if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
                store = dist.PrefixStore(f"restart-{self.restarts}", store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size)
            try:
                yield
                self.barrier()
            except BaseException:
                # Without a barrier, freeing the group may deadlock: it joins gloo's thread while
                # holding the GIL, which that thread may need to free a tensor. So keep the group.
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
                raise
            finally:
                dist.destroy_process_group()

    def barrier(self) -> None:
        """Collective: wait until every rank has called it."""
        if self.size > 1:
            dist.barrier()

    def all_reduce(self, x: Tensor) -> Tensor:
        """Collective: sum ``x`` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def broadcast(self, x: Tensor) -> None:
        """Collective: copy ``x`` from rank 0 to all other ranks."""
        if self.size > 1:
            dist.broadcast(x, 0)

    def any(self, flag: bool) -> bool:
        """Collective: whether ``flag`` is true on any rank."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag))))  # on the CPU: no GPU sync

    def all_gather_object(self, item: Any) -> list[Any]:
        """Collective: the items of all ranks, in rank order."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item)
        return items


ALONE = World()


def is_of_collective(error: RuntimeError) -> bool:
    """Whether a collective failed, for example because a process has ended. gloo's errors have no
    class of their own, but name the source file that raised them."""
    return isinstance(error, dist.DistError) or "/gloo/transport/" in str(error)


@contextmanager
def _failures_in_one_line(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_of_collective(error):
            raise
        cause = " ".join(str(error).split())
        raise ConnectionError(
            f"rank {rank} lost the other processes of the run: {cause}"
        ) from error


def _number(name: str, default: str | None = None) -> int:
    value = os.environ.get(name, default)
    if value is None or not value.isdecimal():
        raise ValueError(f"{name} must be a number from 0, got {value!r}")
    return int(value)
