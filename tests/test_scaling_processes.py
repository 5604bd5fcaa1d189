"""The collectives that bench/scaling.py predicts against those of two real processes: in order, to
the byte, and on the wire.

Run as a program, this file is one of the two processes.
"""

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from _ceilings import DEVICES
from _scaling_links import Cluster, sent_bytes
from _scaling_step import Step, ddp, fsdp
from _scaling_timeline import timeline
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import GPT, GPTConfig
from fastgpt.devices import autocast
from fastgpt.fsdp import shard
from fastgpt.parallel import World
from fastgpt.step import Step as Update

ROOT = Path(__file__).resolve().parent.parent
H200 = DEVICES["h200"]

WORLD = 2
BATCH = 2
# An odd vocabulary cannot be halved, and the gradients, 3.2 MB, fill more than DDP's first bucket.
SMALL = GPTConfig(block_size=16, vocab_size=1001, n_layer=3, n_head=2, n_embd=136)


class Case(NamedTuple):
    parallel: str
    params: str = "float32"  # as the model computes with them
    micro_batches: int = 1
    recompute: bool = False


CASES = {
    "DDP": Case("ddp"),
    "DDP, accumulated": Case("ddp", micro_batches=2),
    "FSDP2, float32": Case("fsdp"),
    "FSDP2, recompute": Case("fsdp", recompute=True),
    "FSDP2, bfloat16": Case("fsdp", "bfloat16"),
    "FSDP2, accumulated": Case("fsdp", "bfloat16", micro_batches=2),
}

_KINDS = {
    "c10d::allreduce_": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "_c10d_functional::all_reduce": "all-reduce",
}


class Collectives(TorchDispatchMode):
    """Writes down every collective and the bytes of its whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # ask again with what it is made of
        if func.name() in _KINDS:
            tensors = [
                tensor
                for argument in args
                for tensor in (argument if isinstance(argument, (list, tuple)) else [argument])
                if isinstance(tensor, torch.Tensor)
            ]
            nbytes = max(tensor.numel() * tensor.itemsize for tensor in tensors)
            self.found.append((_KINDS[func.name()], nbytes))
        return func(*args, **(kwargs or {}))


def received_bytes() -> int:
    """What has come in on all TCP connections of this process, by the kernel's own count."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            is_socket = os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError:  # the listing's own
            continue
        if is_socket:
            with socket.socket(fileno=os.dup(int(name))) as found:
                if found.family != socket.AF_UNIX and found.type == socket.SOCK_STREAM:
                    info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("Q", info, 128)[0]  # tcpi_bytes_received
    return total


def updating(case: Case, world: World) -> Callable[[], float]:
    """Makes an update as ``fastgpt train`` does, and returns its loss."""
    cpu, dtype = torch.device("cpu"), getattr(torch, case.params)
    torch.manual_seed(0)
    gpt = GPT(SMALL, recompute=case.recompute)
    model: torch.nn.Module = gpt
    if case.parallel == "ddp":
        model = DistributedDataParallel(gpt, gradient_as_bucket_view=True)
    else:
        shard(gpt, cpu, world, dtype)
    step = Update(
        model,
        gpt.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu"),
        cpu,
        micro_batches=case.micro_batches,
        grad_clip=1.0,
        autocast=autocast(cpu, dtype),
        world=world,
    )

    def update() -> float:
        shape = (2, BATCH, SMALL.block_size)
        batches = [torch.randint(SMALL.vocab_size, shape) for _ in range(case.micro_batches)]
        return step([(x, y) for x, y in batches], 1e-3).item()

    return update


def process(rank: int, folder: Path) -> None:
    """Three updates of every case; the last one is watched. DDP makes its buckets in the second."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD
    )
    world = World(rank, rank, WORLD)
    found = {}
    for name, case in CASES.items():
        update = updating(case, world)
        for _ in range(2):
            update()
        dist.barrier()
        before = received_bytes() if sys.platform == "linux" else 0
        with Collectives() as collectives:
            loss = update()
        after = received_bytes() if sys.platform == "linux" else 0
        found[name] = {
            "collectives": collectives.found,
            "received": after - before,
            "loss": loss,
        }
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def run_processes(folder: Path) -> list[dict[str, Any]]:
    """What each of them found."""
    path = os.pathsep.join(str(ROOT / name) for name in (".", "bench", "tests"))
    environment = {**os.environ, "PYTHONPATH": path}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    children = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        said = [child.communicate(timeout=600)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * WORLD, "\n".join(said)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def predicted(case: Case) -> Step:
    one = timeline(SMALL, BATCH, case.params, H200, case.recompute)
    step = {"ddp": ddp, "fsdp": fsdp}[case.parallel]
    return step(one, Cluster(450.0), H200, WORLD, case.micro_batches)


def check_wire(found: dict[str, Any], expected: Step) -> None:
    """By the kernel's count, within gloo's headers: less than 1 KiB a collective. Gloo, unlike
    NCCL, reduce-scatters by an all-reduce of which it keeps a part."""
    nbytes = sum(
        sent_bytes("all-reduce" if kind == "reduce-scatter" else kind, payload, WORLD)
        for kind, payload in expected.collectives
    )
    assert 0 <= found["received"] - nbytes < 1024 * len(expected.collectives)


def test_two_processes_send_what_is_predicted(tmp_path: Path) -> None:
    """Every collective, its order and its bytes, the padding of odd rows among them; and that such
    groups train as DDP does. One test, for the processes take seconds to start."""
    processes = run_processes(tmp_path)
    for name, case in CASES.items():
        expected = predicted(case)
        assert len(expected.collectives) > 2
        for found in processes:
            collectives = [(kind, nbytes) for kind, nbytes in found[name]["collectives"]]
            assert collectives == list(expected.collectives), name
            if sys.platform == "linux":
                check_wire(found[name], expected)
            if case.parallel == "fsdp" and case.params == "float32":
                assert found[name]["loss"] == pytest.approx(found["DDP"]["loss"], abs=1e-5)


if __name__ == "__main__":
    process(int(sys.argv[1]), Path(sys.argv[2]))
