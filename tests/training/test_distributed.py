"""A run in two processes is the run in one: weights, resuming, stopping, a process that dies."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.training.distributed import ALONE, World
from tests.tools.small_runs import (
    HANGS,
    arguments,
    assert_same,
    data_set,
    small_keys,
    state_of,
    trained,
)

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"dropout": 0.0, "gradient_accumulation_steps": 2, "max_iters": 19, "lr_decay_iters": 20}


@pytest.fixture(autouse=True)
def small_data(tmp_path: Path) -> Path:
    return data_set(tmp_path)


FASTGPT = ("-m", "fastgpt")


def started(
    keys: dict[str, Any], *more: str, processes: int = 2, program: Sequence[str] = FASTGPT
) -> "subprocess.Popen[str]":
    """`torchrun ... -m fastgpt train ...`, or with another program in place of fastgpt's."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            f"--nproc_per_node={processes}",
            *more,
            *(*program, "train", "--preset=gpt2", *arguments(keys)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def finished(process: "subprocess.Popen[str]") -> str:
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == 0, output
    return output


def weights(root: Path) -> dict[str, torch.Tensor]:
    model: dict[str, torch.Tensor] = state_of(root)["model"]
    return {name: tensor.clone() for name, tensor in model.items()}


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor - b[name]).abs().max() <= 1e-6, name


# AdamW's eps is small beside most gradients; where a gradient is 0 but for its rounding (the bias
# of the keys), the order of two sums decides on the sign of an update. So: no biases.


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_as_one(tmp_path: Path, parallel: str) -> None:
    """The same batches, one half each; one speaks, one log, one checkpoint. The evaluation has one
    batch more for the first."""
    keys = small_keys(tmp_path, **{**SHORT, "eval_iters": 3, "gradient_accumulation_steps": 4})
    keys |= {"parallel": parallel, "recompute": parallel == "fsdp"}
    output = finished(started(keys))
    assert output.count("step 0: train loss") == output.count("iter 15: loss") == 1
    two, saved = weights(tmp_path), state_of(tmp_path)
    published = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)  # one file in any case
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [row["iter"] for row in log if "loss" in row] == [0, 5, 10, 15]
    one = trained(tmp_path, **{**SHORT, "eval_iters": 3, "gradient_accumulation_steps": 4})
    assert_near(two, weights(tmp_path))
    assert saved["best_val_loss"].item() == pytest.approx(one.best_val_loss, abs=1e-5)
    assert len(saved["fastgpt"]["generators"]) == 2
    assert_near(published["model"], two)
    assert torch.equal(
        saved["fastgpt"]["data"]["train"], state_of(tmp_path)["fastgpt"]["data"]["train"]
    )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_in_another_number_of_processes(
    tmp_path: Path, first: int, parallel: str
) -> None:
    whole = trained(tmp_path, **SHORT)
    expected = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    for processes, keys in (
        (first, small_keys(tmp_path, **{**SHORT, "max_iters": 9}, parallel=parallel)),
        (3 - first, small_keys(tmp_path, **SHORT, init_from="resume", parallel=parallel)),
    ):
        finished(started(keys, processes=processes))
    assert state_of(tmp_path)["iter_num"] == 20
    assert_near(weights(tmp_path), expected)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + HANGS
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def test_sigterm_saves_and_ends(tmp_path: Path) -> None:
    process = started(small_keys(tmp_path, **{**SHORT, "max_iters": 10**6}))
    wait_for(tmp_path / "out" / "iter-0000010.pt", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=HANGS)
    assert "stopped before iteration" in output
    before = state_of(tmp_path)["iter_num"]
    keys = small_keys(tmp_path, **{**SHORT, "max_iters": before + 1}, init_from="resume")
    assert f"at iteration {before}" in finished(started(keys, processes=1))
    assert state_of(tmp_path)["iter_num"] == before + 2


# fastgpt, of which the second process is killed before iteration 31, but only the first time.
KILLED_ONCE = """
import os, signal, sys
from fastgpt.__main__ import main
from fastgpt.training.trainer import Trainer

update = Trainer._update

def killed(self, learning_rate):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.world.rank == 1 and self.iter_num == 31:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, learning_rate)

Trainer._update = killed
sys.exit(main())
"""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_killed_process_is_started_again_and_goes_on(tmp_path: Path, parallel: str) -> None:
    """To the bit as if nothing had happened, dropout included."""
    changes = {**SHORT, "max_iters": 100, "eval_interval": 20, "dropout": 0.1, "parallel": parallel}
    finished(started(small_keys(tmp_path, **changes)))
    whole = state_of(tmp_path)
    (tmp_path / "out").rename(tmp_path / "whole")

    program = tmp_path / "program.py"
    program.write_text(KILLED_ONCE)
    keys = small_keys(tmp_path, **changes)
    output = finished(started(keys, "--max-restarts=1", program=[str(program)]))
    assert "going on from" in output and "at iteration 20" in output
    after = state_of(tmp_path)
    assert after["iter_num"] == 101
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
