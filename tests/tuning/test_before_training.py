"""Tuning before ``fastgpt train``: when, in which process, and that training runs in any case."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgpt import GPT, Bigram, GPTConfig
from fastgpt.cli import train as cli_train
from fastgpt.kernels import configs, tuned_table
from fastgpt.kernels.configs import Elementwise, Key
from fastgpt.training.config import TrainConfig
from fastgpt.training.distributed import World
from fastgpt.tuning import Table, Workload, __main__, before_training
from fastgpt.tuning.before_training import tune_before_training
from fastgpt.tuning.table import Line

GPU = torch.device("cuda", 0)
SHAPE = GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=1, n_embd=16, dropout=0.1)
WORK = Workload(SHAPE, 3, torch.float16, recompute=True)
LINE = Line(Key("gelu", "fwd", "sm_90", "half"), Elementwise(512, 4), ["x"], 1.0, 2.0, 1.0, 2)


@pytest.fixture(autouse=True)
def _gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend to be a machine with this GPU, as far as the tuned table goes."""
    facts = {"gpu": "GPU X", "driver": "1.2", "torch": "2", "triton": "3", "kernels": "abc"}
    monkeypatch.setattr(tuned_table, "made_for", lambda device: facts)
    monkeypatch.setenv("FASTGPT_TUNED", str(tmp_path))
    monkeypatch.setattr(configs, "_TUNED", {None: {}})
    yield


def other_process(monkeypatch: pytest.MonkeyPatch, end: Any) -> list[str]:
    """Replace starting the tuner's process; return its inputs. ``end`` is its result, or raised."""
    given: list[str] = []

    def run(command: list[str], timeout: float, **options: Any) -> Any:
        assert command[:3] == [sys.executable, "-m", "fastgpt.tuning"] and timeout <= 60
        given.append(command[3])
        Table(GPU, {LINE.key: LINE}).write()
        if isinstance(end, Exception):
            raise end
        return end

    monkeypatch.setattr(before_training.subprocess, "run", run)
    return given


def ended(code: int, *lines: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.CompletedProcess([], code, stdout="\n".join(lines))


def test_another_process_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process gets the same workload; this one uses the entries that it wrote."""
    given = other_process(monkeypatch, ended(0, "gelu: 2 times", "1 launches measured"))
    said: list[object] = []
    assert configs.tuned(GPU) == {}  # as if a kernel had been launched before
    tune_before_training(WORK, GPU, said.append)
    assert len(said) == 2 and "60 s at most" in str(said[0]) and "--tune=False" in str(said[0])
    assert said[1] == "1 launches measured"
    assert configs.tuned(GPU) == {LINE.key: LINE.config}

    def tune(work: Workload, device: torch.device, **options: Any) -> tuple[Table, int]:
        assert work == WORK and str(work) == str(WORK) and device == GPU
        assert options["seconds"] < 60 and options["only_missing"] is True
        return Table(GPU), 3

    monkeypatch.setattr(__main__, "tune", tune)
    monkeypatch.setattr(__main__, "resolve_device", torch.device)
    assert __main__.main(given) == 0


@pytest.mark.parametrize("error", [ValueError("a\nb"), OSError("a"), RuntimeError("a")])
def test_what_the_other_process_says_of_a_failure(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = other_process(monkeypatch, ended(0))
    tune_before_training(WORK, GPU, lambda text: None)

    def tune(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(__main__, "tune", tune)
    monkeypatch.setattr(__main__, "resolve_device", torch.device)
    assert __main__.main(given) == 1
    assert capsys.readouterr().out == f"{type(error).__name__}: a\n"


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (ended(1, "OutOfMemoryError: 3 GiB"), "not tuned, training continues: OutOfMemoryError"),
        (ended(-11), "not tuned, training continues: exit code -11"),
        (subprocess.TimeoutExpired("x", 60), "stopped tuning after 60 s"),
        (OSError("no memory"), "not tuned, training continues: no memory"),
        (OSError(12, "no memory", "python"), "not tuned, training continues: no memory: python"),
    ],
)
def test_training_goes_on(end: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training uses the entries that were decided before the failure."""
    other_process(monkeypatch, end)
    lines: list[object] = []
    tune_before_training(WORK, GPU, lines.append)
    assert len(lines) == 2 and str(lines[1]).startswith(said)
    assert configs.tuned(GPU) == {LINE.key: LINE.config}


def test_when_nothing_is_to_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    given = other_process(monkeypatch, ended(0))
    said: list[object] = []
    tune_before_training(Workload(SHAPE, 3, torch.float32), GPU, said.append)
    Table(GPU, workloads=[str(WORK)]).write()
    tune_before_training(WORK, GPU, said.append)
    tune_before_training(WORK, GPU, said.append, n_processes=8)
    assert not said and not given
    tune_before_training(Workload(SHAPE, 4), GPU, said.append, n_processes=8)
    assert len(said) == 1 and "fastgpt tune" in str(said[0]) and not given
    tune_before_training(Workload(SHAPE, 4), GPU, said.append)
    assert len(given) == 1
    monkeypatch.setenv("FASTGPT_TUNED", "")
    tune_before_training(Workload(SHAPE, 5), GPU, said.append)
    assert len(given) == 1 and len(said) == 3


def test_the_other_process_starts_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real process finds the package, but no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    said: list[object] = []
    tune_before_training(WORK, GPU, said.append)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    why = "ValueError: device must be one that this machine has (cpu), got 'cuda:0'"
    assert str(said[1]).startswith(f"not tuned, training continues: {why}")


def test_when_a_run_tunes(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTs on supported GPUs are tuned for the model's shape and the run's batch and dtype."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(before_training, "tune_before_training", lambda *args: asked.append(args))
    refusal = [""]
    monkeypatch.setattr(cli_train, "triton_refusal", lambda device: refusal[0])

    model = GPT(SHAPE)

    def tunes(model: Any = model, device: torch.device = GPU, **keys: Any) -> bool:
        config = TrainConfig(batch_size=3, recompute=True, **keys)
        world, before = World(size=2), len(asked)
        trainer: Any = SimpleNamespace(
            model=model, device=device, dtype=torch.float16, config=config, world=world
        )
        console: Any = SimpleNamespace(print=print)
        cli_train._tune(trainer, console)
        return len(asked) > before

    assert tunes() and asked == [(WORK, GPU, print, 2)]
    assert tunes(init_from="gpt2")
    assert not tunes(Bigram(SHAPE))
    assert not tunes(device=torch.device("cpu"))
    assert not tunes(tune=False) and not tunes(eval_only=True)
    assert not tunes(init_from="resume")  # other launches would round differently
    refusal[0] = "too old"
    assert not tunes()
    monkeypatch.setattr(World, "is_main", False)
    refusal[0] = ""
    assert not tunes()
