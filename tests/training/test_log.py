"""``log.jsonl``, TensorBoard and Weights & Biases."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fastgpt.training import log
from fastgpt.training.log import RunLog
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import data_set, quiet, small_config, trained


def rows(root: Path) -> list[dict[str, Any]]:
    return log.read(root / "out" / "log.jsonl")


def places(root: Path) -> tuple[list[int], list[int]]:
    """Iterations with reports and with evaluations."""
    found = rows(root)
    return (
        [row["iter"] for row in found if "loss" in row],
        [row["iter"] for row in found if "val/loss" in row],
    )


def without_clock(root: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in ("time", "tokens_per_second")}
        for row in rows(root)
    ]


def test_a_run_writes_its_figures(tmp_path: Path) -> None:
    data_set(tmp_path)
    trainer = trained(tmp_path)
    text = (tmp_path / "out" / "log.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert found == rows(tmp_path)
    assert places(tmp_path) == ([0, 5, 10, 15, 20], [0, 10, 20, 21])
    reports = [row for row in found if "loss" in row]
    assert sorted(reports[0]) == ["iter", "loss", "lr", "time", "tokens_per_second"]
    assert [row["lr"] for row in reports] == [trainer.learning_rate(i) for i in range(0, 21, 5)]
    assert all(0 < row["loss"] < 5 and row["tokens_per_second"] > 0 for row in reports)
    evaluations = [row for row in found if "val/loss" in row]
    assert sorted(evaluations[0]) == ["iter", "lr", "mfu", "time", "train/loss", "val/loss"]
    assert evaluations[-1]["val/loss"] == trainer.val_loss
    times = [row["time"] for row in found]
    assert times == sorted(times)


def test_a_line_is_on_disk_when_it_is_reported(tmp_path: Path) -> None:
    """Non-finite values are written as null."""
    (tmp_path / "out").mkdir()
    run_log = RunLog(config := small_config(tmp_path))
    with run_log.opened(config, 0, True):
        for i in range(3):
            run_log.write(i, {"loss": 1.0, "lr": 0.1, "tokens_per_second": 5.0})
            assert len(rows(tmp_path)) == i + 1
        run_log.write(3, {"train/loss": float("nan"), "val/loss": float("inf")})
    first, *_, last = rows(tmp_path)
    assert first["loss"] == 1.0
    assert last["train/loss"] is None and last["val/loss"] is None


def test_a_run_that_goes_on_writes_the_log_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for root in (one, other):
        data_set(root)
    trained(one)
    trained(other, max_iters=13)  # the last checkpoint is at iteration 14
    assert places(other) == ([0, 5, 10], [0, 10, 14])
    trained(other, init_from="resume")
    assert places(other) == ([0, 5, 10, 15, 20], [0, 10, 14, 20, 21])
    trained(other, init_from="resume")  # repeats the last evaluation
    assert places(other) == ([0, 5, 10, 15, 20], [0, 10, 14, 20, 21])
    kept = [row for row in without_clock(other) if row["iter"] != 14]
    assert kept == without_clock(one)


def test_the_speed_is_that_of_the_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates still running on the GPU when an evaluation starts count, the evaluation does not."""
    data_set(tmp_path)
    now = 0.0

    def takes(seconds: float, name: str) -> None:
        method = getattr(Trainer, name)

        def slow(run: Trainer, *args: Any) -> Any:
            nonlocal now
            now += seconds
            return method(run, *args)

        monkeypatch.setattr(Trainer, name, slow)

    takes(2.0, "_check_finite")
    takes(100.0, "evaluate")
    takes(100.0, "_save")
    monkeypatch.setattr("fastgpt.training.run.perf_counter", lambda: now)
    monkeypatch.setattr(Trainer, "_updated", lambda run, batches, rate: run._step(batches, rate))
    trained(tmp_path, eval_interval=4, log_interval=3, max_iters=6)
    tokens = 2 * 4 * 16  # per update
    speeds = [row["tokens_per_second"] for row in rows(tmp_path) if "loss" in row]
    assert speeds == [tokens / 4.0, 3 * tokens / 2.0, 3 * tokens / 4.0]


def test_what_was_lost_with_a_crash_is_not_logged_twice(tmp_path: Path) -> None:
    """Killed at iteration 18: the checkpoint is from 10, the last line only partly written."""
    data_set(tmp_path)
    trained(tmp_path, max_iters=9)
    expected = without_clock(tmp_path)
    path = tmp_path / "out" / "log.jsonl"
    with open(path, "a") as file:
        file.write('{"iter": 10, "train/loss": 1.0, "val/loss": 1.0}\n')  # will be repeated
        file.write('{"iter": 10, "loss": 1.0}\n{"iter": 15, "loss": 1.0}\n{"iter": 17, "lo')
    trained(tmp_path, init_from="resume")
    assert places(tmp_path) == ([0, 5, 10, 15, 20], [0, 10, 20, 21])
    assert without_clock(tmp_path)[:3] == expected[:3]
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("figure", ["loss", "reward"])
def test_the_evaluation_at_a_stop_is_kept(tmp_path: Path, figure: str) -> None:
    """For any kind of run; an evaluation is not repeated if the run resumes between two others."""
    (tmp_path / "out").mkdir()
    run_log = RunLog(config := small_config(tmp_path))
    with run_log.opened(config, 0, True):
        run_log.write(14, {figure: 1.0})
        run_log.write(14, {f"val/{figure}": 2.0})
    with run_log.opened(config, 14, False):
        assert [f"val/{figure}" in row for row in rows(tmp_path)] == [True]


def test_a_log_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with pytest.raises(FileNotFoundError, match="there is no .*log.jsonl"):
        log.read(path)
    for line, message in (
        ("{", "not a line of JSON"),
        ("\N{LATIN SMALL LETTER E WITH ACUTE}", "not a line of JSON"),
        ("[1]", "must be an object with an integer 'iter'"),
        ('{"iter": "1"}', "must be an object with an integer 'iter'"),
    ):
        path.write_bytes(b'{"iter": 0}\n' + line.encode("latin-1") + b"\n")
        with pytest.raises(ValueError, match=f"log.jsonl:2: {message}"):
            log.read(path)


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra log")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data_set(tmp_path)
    trained(tmp_path, max_iters=13, tensorboard_log=True)
    trained(tmp_path, init_from="resume", tensorboard_log=True)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    named = {"loss", "lr", "mfu", "tokens_per_second", "train/loss", "val/loss"}
    assert set(events.Tags()["scalars"]) == named
    written = {row["iter"]: row["loss"] for row in rows(tmp_path) if "loss" in row}
    assert {e.step: e.value for e in events.Scalars("loss")} == pytest.approx(written)
    assert [event.step for event in events.Scalars("loss")] == [0, 5, 10, 15, 20]


def test_wandb_gets_nanogpts_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    data_set(tmp_path)
    trainer = trained(tmp_path, wandb_log=True, wandb_project="p", wandb_run_name="r")
    wandb.init.assert_called_once_with(project="p", name="r", config=vars(trainer.config))
    logged = [call.args[0] for call in wandb.log.call_args_list]
    assert [row["iter"] for row in logged] == [0, 10, 20, 21]
    assert sorted(logged[1]) == ["iter", "lr", "mfu", "train/loss", "val/loss"]
    wandb.finish.assert_called_once_with()


def test_wandb_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra log")

    def refuse(**options: Any) -> None:
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr(wandb, "init", refuse)
    data_set(tmp_path)
    with pytest.raises(ValueError, match=r"wandb_log=True: No API key .* WANDB_MODE=offline") as e:
        trained(tmp_path, wandb_log=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("key", "module"), [("wandb_log", "wandb"), ("tensorboard_log", "torch.utils.tensorboard")]
)
def test_a_missing_package_is_named_before_any_work(
    key: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{key}=True .*pip install -e "\.\[log\]" in '):
        Trainer(small_config(tmp_path, **{key: True}), quiet())  # raises before it needs a data set
