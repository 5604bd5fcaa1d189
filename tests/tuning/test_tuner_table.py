"""What a tuner run saves, however it ends, and errors that a user can cause."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.kernels import _host, configs, tuned_table
from fastgpt.kernels.configs import Key
from fastgpt.tuning import Table, Workload, summary, tuner
from fastgpt.tuning.phase import Phase
from fastgpt.tuning.table import choices
from tests.tools import interpreter
from tests.tools.forked import Forked
from tests.tuning.small_tuning import CPU, WORK, clock, last, number, on_no_gpu, only, run, trust

pytestmark = pytest.mark.usefixtures("measured")


def test_what_is_decided_is_not_measured_again(
    trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, Key("adamw", "update"), Key("layer_norm", "fwd"), Key("gemm", "bwd"))
    clock(monkeypatch, last)
    before = run()[0]
    timed = clock(monkeypatch, lambda key, config: 0.0)
    assert run()[0] == before
    n_phases = len(timed)  # each one once, for the order
    other = Workload(WORK.config, 2)
    assert run(other, only_missing=True)[0].workloads == [str(WORK), str(other)]
    assert len(timed) == 2 * n_phases
    after = run(other)[0].lines
    assert len(timed) > 3 * n_phases
    adamw = Key("adamw", "update", "sm_90", "float32")  # independent of the batch
    assert after[adamw] == before.lines[adamw] and number(adamw, after[adamw].config) > 0
    again = [line for line in after.values() if "(2, 8" in line.at[0]]
    assert {line.key.op for line in again} == {"gemm", "layer_norm"}
    assert all(number(line.key, line.config) == 0 for line in again)


def test_the_time_is_kept(trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit: it stops, saves its decisions, reports what is left, and can resume."""
    now = [0.0]
    monkeypatch.setattr(tuner.time, "monotonic", lambda: now[0])
    decide = tuner.Tuner.decide

    def slow(*args: Any) -> Any:
        now[0] += 10.0
        return decide(*args)

    monkeypatch.setattr(tuner.Tuner, "decide", slow)
    table, left = run(seconds=0.0)
    assert not table.lines and left > 5 and not table.workloads
    table, left = run(seconds=25.0)
    assert len(table.lines) == 3 and left > 5 and not table.workloads
    assert Table.read(CPU) == table and configs.tuned(CPU).keys() == table.lines.keys()
    assert "not decided yet" in summary(table, left)
    table, left = run(seconds=1e9)
    assert left == 0 and table.workloads and "not decided" not in summary(table, left)


def test_what_takes_most_time_comes_first(trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Total time in a step counts: a pass of 2 ms that runs three times precedes one of 5 ms."""
    order = ["mlp (1, 8, 16) (64, 16) (16, 64) forward", "adamw forward"]
    once = {order[0]: 2.0, order[1]: 5.0}
    monkeypatch.setattr(
        tuner.Tuner, "once", lambda self, phase: phase.count * once.get(str(phase), 1e-3)
    )
    table, _ = run()
    keys = list(table.lines)
    assert {key[:2] for key in keys[:2]} == {("gemm", "fwd"), ("gelu", "fwd")}
    assert keys[2][:2] == ("adamw", "update")


def _killed(folder: Path, die_at: int) -> None:
    """A tuner that is killed in decision number ``die_at``; never, if that is 0."""
    interpreter.install()
    with pytest.MonkeyPatch.context() as patch, _host.interpreted(True, 90):
        only(patch, Key("gemm", "fwd"), Key("gemm", "bwd"), Key("gemm", "weight"))
        on_no_gpu(patch, folder)
        trust(patch)
        times, decide, asked = tuner.Tuner._times, tuner.Tuner.decide, itertools.count(1)

        def killed(self: tuner.Tuner, *args: Any) -> Any:
            if next(asked) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return times(self, *args)

        def noted(self: tuner.Tuner, key: Key, phases: Any) -> Any:
            print(json.dumps(key))
            return decide(self, key, phases)

        patch.setattr(tuner.Tuner, "_times", killed)
        patch.setattr(tuner.Tuner, "decide", noted)
        assert run()[1] == 0


def test_killed_at_any_time_it_goes_on(tmp_path: Path) -> None:
    """kill -9 during the fifth decision; the four before are kept."""
    folder = tmp_path / "tuned"
    Forked(_killed, folder, 5).finished(-signal.SIGKILL)
    (path,) = folder.glob("*.json")
    held = json.loads(path.read_text())
    kept = [line["key"] for line in held["lines"]]
    assert len(kept) == 4 and not held["workloads"]
    (folder / f".{path.name}.tmp").write_text("half a file")  # from an interrupted write
    decided = [json.loads(line) for line in Forked(_killed, folder, 0).finished().splitlines()]
    held = json.loads(path.read_text())
    assert held["workloads"] and [line["key"] for line in held["lines"]] == [*kept, *decided]


def test_a_damaged_table_is_made_anew(trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, Key("gemm", "fwd"))
    before, _ = run()
    path = tuned_table.path_of(CPU)
    assert path is not None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="is ignored"):
        table, left = run()
    assert left == 0 and table == before == Table.read(CPU)


def test_a_candidate_that_breaks_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process must end; the next one leaves that candidate out."""
    key = Key("gemm", "fwd", "sm_90", "half", 16)
    only(monkeypatch, key)
    second = choices(key, CPU)[1]
    broken = [False]

    def check(self: Phase, expected: Any) -> None:
        if configs.tuned(CPU)[key] == second:
            broken[0] = True
            raise RuntimeError("CUDA error: an illegal memory access\nmore")

    def synchronize(device: torch.device) -> None:
        if broken[0]:
            raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(Phase, "check", check)
    monkeypatch.setattr(tuner, "synchronize", synchronize)
    with pytest.raises(RuntimeError, match=r"the GPU failed with Gemm\(.*tune again"):
        run()
    assert key not in configs.tuned(CPU)
    broken[0] = False
    shown: list[str] = []
    table, left = run(show=shown.append)
    assert left == 0 and table.lines[key].n_tried == len(choices(key, CPU)) - 1
    assert ": RuntimeError: CUDA error: an illegal memory access" in shown[0]


def test_too_little_memory(trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For an entry: the others are still decided. For a candidate: it is tried again next time."""
    key, other = Key("gemm", "fwd", "sm_90", "half", 16), Key("gemm", "bwd", "sm_90", "half", 64)
    only(monkeypatch, key, other)
    second = choices(other, CPU)[1]

    def expected(self: Phase) -> None:
        if key in configs.tuned(CPU):
            raise torch.OutOfMemoryError("too large")

    def check(self: Phase, expected: Any) -> None:
        if configs.tuned(CPU).get(other) == second:
            raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(Phase, "expected", expected)
    monkeypatch.setattr(Phase, "check", check)
    shown: list[str] = []
    table, left = run(show=shown.append)
    assert left == 0 and key not in table.lines and not table.rejected
    assert table.lines[other].n_tried == len(choices(other, CPU)) - 1
    assert any("gemm fwd 16: not enough memory" in text for text in shown)


def test_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues with the same random numbers and float32 matmul precision."""
    only(monkeypatch, Key("gemm", "fwd"))
    torch.set_float32_matmul_precision("high")
    state = torch.get_rng_state()
    assert run()[1] == 0
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_float32_matmul_precision() == "high"


def test_what_a_user_can_do_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgpt._files import exclusive_lock

    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Workload(WORK.config, 0)
    with pytest.raises(ValueError, match="seconds must be at least 0, got -1"):
        run(seconds=-1)
    with exclusive_lock(tmp_path), pytest.raises(ValueError, match="another process"):
        run()
    monkeypatch.setenv("FASTGPT_TUNED", "")
    with pytest.raises(ValueError, match="FASTGPT_TUNED must name a folder for tuning, got ''"):
        run()
