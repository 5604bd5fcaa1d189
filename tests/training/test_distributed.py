"""Runs in two processes equal runs in one: weights, resuming, stopping, a killed process."""

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import run
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastgpt.__main__ import main
from fastgpt.training.distributed import ALONE, World
from tests.tools.forked import ROOT, Forked
from tests.tools.small_runs import assert_same, data_set, small_keys, state_of, trained
from tests.training.processes import (
    command,
    interrupted_one_by_one,
    killed_once,
    one_interrupted_twice,
    started,
)

# No biases: the gradient of the keys' bias is 0 up to rounding, and since AdamW's eps is small, the
# order of sums would decide the sign of its update. In the evaluation the first process has one
# batch more.
SHORT: dict[str, Any] = dict(
    dropout=0.0, gradient_accumulation_steps=4, eval_iters=3, max_iters=19, lr_decay_iters=20
)


@pytest.fixture(autouse=True)
def small_data(tmp_path: Path) -> Path:
    return data_set(tmp_path)


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor - b[name]).abs().max() <= 1e-6, name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(tmp_path: Path, parallel: str) -> None:
    """Each process gets half of every batch; output, log and checkpoint are written once. A run can
    resume with more or fewer processes."""
    sharded = {"parallel": parallel, "recompute": parallel == "fsdp"}
    half = trained(tmp_path, **{**SHORT, "max_iters": 9})
    expected_state = state_of(tmp_path)
    trained(tmp_path, **SHORT, init_from="resume")
    expected = state_of(tmp_path)["model"]

    keys = small_keys(tmp_path, **{**SHORT, **sharded, "max_iters": 9})
    output = started(keys, processes=2).finished()
    assert output.count("step 0: train loss") == output.count("iter 5: loss") == 1
    saved = state_of(tmp_path)
    assert_near(dict(saved["model"]), dict(expected_state["model"]))
    assert saved["best_val_loss"].item() == pytest.approx(half.best_val_loss, abs=1e-5)
    assert len(saved["fastgpt"]["generators"]) == 2
    assert_same(saved["fastgpt"]["data"], expected_state["fastgpt"]["data"])
    published = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)  # one file in any case
    assert_near(published["model"], dict(saved["model"]))
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["iter"] for row in log if "loss" in row] == [0, 5]

    trained(tmp_path, **SHORT, **sharded, init_from="resume")
    assert_near(state_of(tmp_path)["model"], expected)
    trained(tmp_path, **{**SHORT, "max_iters": 9})
    started(small_keys(tmp_path, **SHORT, **sharded, init_from="resume"), processes=2).finished()
    assert state_of(tmp_path)["iter_num"] == 20
    assert_near(state_of(tmp_path)["model"], expected)


def _on_one_gpu(argv: list[str]) -> int:
    os.environ["LOCAL_RANK"] = "0"
    return main(argv)


def test_two_processes_with_master_weights_train_as_one(tmp_path: Path, device: str) -> None:
    """Bit for bit, as the sum of two gradients has one order: bfloat16 weights, float32 masters.
    On a GPU, shared by both processes, the backward passes are CUDA graphs."""
    keys = {**SHORT, "gradient_accumulation_steps": 2, "dtype": "bfloat16", "device": device}
    if device == "cuda":
        keys |= {"n_embd": 64, "block_size": 64}
    trained(tmp_path, **keys)
    expected = state_of(tmp_path)
    argv = command(small_keys(tmp_path, **keys, backend="gloo"))
    Forked(_on_one_gpu, argv, processes=2).finished()
    found = state_of(tmp_path)
    assert found["iter_num"] == expected["iter_num"] == 20
    assert_same(found["model"], expected["model"])
    assert_same(found["optimizer"], expected["optimizer"])


@pytest.mark.parametrize("first", [0, 1])
def test_sigterm_saves_and_ends(tmp_path: Path, first: int) -> None:
    """Both processes save and end, even if the signal reaches one of them later."""
    argv = command(small_keys(tmp_path, **SHORT))
    output = Forked(interrupted_one_by_one, first, argv, processes=2).finished(130)
    assert "stopped before iteration 12" in output
    assert state_of(tmp_path)["iter_num"] == 12
    trained(tmp_path, **{**SHORT, "max_iters": 12}, init_from="resume")
    assert state_of(tmp_path)["iter_num"] == 13


@pytest.mark.parametrize("which, at", [(0, "update"), (1, "save")])
def test_a_second_ctrl_c_in_one_process_ends_all(tmp_path: Path, which: int, at: str) -> None:
    argv = command(small_keys(tmp_path, **SHORT))
    output = Forked(one_interrupted_twice, which, at, argv, processes=2).finished(130)
    assert output.count("interrupted") == 2 and "Traceback" not in output, output


def test_a_lost_process_is_one_line(tmp_path: Path) -> None:
    argv = command(small_keys(tmp_path, **{**SHORT, "max_iters": 40}))
    output = Forked(killed_once, argv, processes=2).finished(-signal.SIGKILL, 1)
    assert "error: rank 0 lost the other processes of the run: " in output
    assert "Traceback" not in output, output


def test_a_port_in_use_is_one_line(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        names = dict(WORLD_SIZE=2, RANK=0, LOCAL_RANK=0, MASTER_PORT=taken.getsockname()[1])
        for name, value in {**names, "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(name, str(value))
        line = refused("train", "--preset=gpt2", "--device=cpu", code=1)
    assert "rank 0 lost the other processes of the run: " in line and "in use" in line


def _agent(argv: list[str]) -> int:
    """torchrun's agent with forked processes."""
    config = LaunchConfig(1, 1, 2, run_id="x", rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    config.max_restarts, config.start_method = 1, "fork"
    elastic_launch(config, killed_once)(argv)
    return 0


def _torchrun(argv: list[str]) -> int:
    """The torchrun command itself."""
    program = ROOT / "tests" / "training" / "processes.py"
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    run.main([*options, str(program), *argv])
    return 0


@pytest.mark.parametrize(
    "parallel, launched", [("ddp", _agent), pytest.param("fsdp", _torchrun, marks=pytest.mark.slow)]
)
def test_a_killed_process_is_started_again_and_goes_on(
    tmp_path: Path, parallel: str, launched: Callable[[list[str]], int]
) -> None:
    """The result equals an uninterrupted run bit for bit, dropout included."""
    changes = {**SHORT, "max_iters": 40, "eval_interval": 20, "dropout": 0.1, "parallel": parallel}
    keys = small_keys(tmp_path, **changes)
    started(keys, processes=2).finished()
    whole = state_of(tmp_path)
    (tmp_path / "out").rename(tmp_path / "whole")

    output = Forked(launched, command(keys)).finished()
    assert "resuming from" in output and "at iteration 20" in output
    after = state_of(tmp_path)
    assert after["iter_num"] == 41
    for key in ("model", "optimizer", "best_val_loss"):
        assert_same(after[key], whole[key])


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert World.from_environment() == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="WORLD_SIZE=4 needs RANK, LOCAL_RANK, .*torchrun"):
        World.from_environment()
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    world = World.from_environment()
    assert world == World(3, 3, 4, 2) and not world.is_main
    assert world.device(torch.device("cuda")) == torch.device("cuda:3")
    assert world.device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(ValueError, match="RANK must be a number from 0, got 'x'"):
        World.from_environment()
