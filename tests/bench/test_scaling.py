"""bench/scaling.py: its collectives against those of two real processes, and its table."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench import scaling
from fastgpt import GPT, GPTConfig
from fastgpt.devices import autocast
from fastgpt.training.distributed import World
from fastgpt.training.fsdp import shard
from fastgpt.training.optimizer import MasterAdamW
from fastgpt.training.step import Step
from tests.tools.forked import Forked

WORLD = MICRO_BATCHES = BATCH = 2
PARALLEL: tuple[scaling.Parallel, ...] = ("ddp", "fsdp")
# An odd vocabulary cannot be split evenly between two processes.
SMALL = GPTConfig(block_size=16, vocab_size=1001, n_layer=2, n_head=2, n_embd=64)


_KINDS = {
    "c10d::allreduce_": "all-reduce",
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    "_c10d_functional::all_reduce": "all-reduce",
}


class Collectives(TorchDispatchMode):
    """Records every collective and the bytes of its whole tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # dispatch again with the local tensors
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


def updating(parallel: str, world: World) -> Callable[[], float]:
    """``fastgpt train``'s update, which returns the loss."""
    cpu, dtype = torch.device("cpu"), torch.bfloat16
    torch.manual_seed(0)
    gpt = GPT(SMALL)
    options = 0.1, 1e-3, (0.9, 0.95)
    if parallel == "ddp":
        optimizer: torch.optim.Optimizer = MasterAdamW(gpt, dtype, *options, world)
    else:
        shard(gpt, cpu, world, dtype)
        optimizer = gpt.configure_optimizers(*options, "cpu")
    step = Step(
        gpt,
        optimizer,
        cpu,
        micro_batches=MICRO_BATCHES,
        grad_clip=1.0,
        autocast=autocast(cpu, dtype),
        world=world,
    )

    def update() -> float:
        shape = (2, BATCH, SMALL.block_size)
        batches = [torch.randint(SMALL.vocab_size, shape) for _ in range(MICRO_BATCHES)]
        return step([(x, y) for x, y in batches], 1e-3).item()

    return update


def process(folder: Path) -> None:
    """Write the collectives of the second update; FSDP2's first one has more."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    world = World(rank, rank, WORLD)
    found = {}
    for parallel in PARALLEL:
        update = updating(parallel, world)
        update()
        with Collectives() as collectives:
            update()
        found[parallel] = collectives.found
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_two_processes_send_what_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    Forked(process, tmp_path, processes=WORLD).finished()
    parameters = scaling.parameters_of(SMALL)
    for parallel in PARALLEL:
        expected = scaling.collectives(parameters, parallel, WORLD, MICRO_BATCHES)
        for rank in range(WORLD):
            found = json.loads((tmp_path / f"{rank}.json").read_text())[parallel]
            assert sorted(map(tuple, found)) == sorted(expected), parallel


def test_bytes_and_time_of_a_collective_by_hand() -> None:
    """Bandwidth of the slowest link bounds a large collective, latency of its steps a small one."""
    assert scaling.sent_bytes([("all-gather", 800)], 8) == 700
    assert scaling.sent_bytes([("reduce-scatter", 800)], 8) == 700
    assert scaling.sent_bytes([("all-reduce", 800)], 8) == 1400
    assert scaling.sent_bytes([("all-reduce", 800)], 1) == 0
    options = scaling.Options()
    large, small = 64 << 30, 4
    seven_eighths = 7 / 8 * large / 370e9 * 1e3
    assert scaling.communication_ms([("all-gather", large)], 8, options) == pytest.approx(
        seven_eighths, rel=1e-3
    )
    slow = scaling.Options(network=200.0)  # eight adapters of 23.5 GB/s
    assert scaling.communication_ms([("all-gather", large)], 64, slow) == pytest.approx(
        63 / 64 * large / (8 * 23.5e9) * 1e3, rel=1e-3
    )
    ring = 14.0 + (1024 - 128) * 1.9 + 127 * 4.0
    found = scaling.communication_ms([("reduce-scatter", small)], 1024, options)
    assert 1e3 * found == pytest.approx(ring, rel=1e-3)
    tree = 14.0 + 2 * (7 * 1.25 + 7 * 8.5)
    found = scaling.communication_ms([("all-reduce", small)], 1024, options)
    assert 1e3 * found == pytest.approx(tree, rel=1e-3)


def test_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The table fits into 80 columns, the width assumed for a pipe."""
    monkeypatch.setenv("COLUMNS", "80")
    assert scaling.main(["--gpus", "1024", "1", "8", "--batch_size=1"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "DDP, predicted, not measured" in shown and "FSDP2, predicted, not measured" in shown
    rows = [line.split() for line in shown.splitlines() if line.split()[:1] in (["1"], ["8"])]
    assert len(rows) == 4
    one, eight = rows[:2]  # DDP
    assert one[1:3] == ["0.000", "0.00"] and one[-1] == "100.0%"
    assert 0 < float(eight[-1].rstrip("%")) < 100
    one, eight = rows[2:]  # FSDP2
    assert one[-1] == one[-3] == "100.0%"
    assert 0 < float(eight[-3].rstrip("%")) < float(eight[-1].rstrip("%"))
