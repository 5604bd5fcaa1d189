"""bench/gpu_report.py: its time, stages that crash, hang or lack a library, and what lies on disk
when it is cut off. What the stages find: test_gpu_stages.py.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _stages
import _visit
import gpu_report
import pytest
import torch
from _visit import Stage, budget, read_json, visit
from small_visits import CEILINGS, FACTS, MACHINE, alive, records, stage, wait_until

ROOT = Path(__file__).resolve().parent.parent

# -- time


def test_time_that_was_not_used_goes_to_the_stages_that_follow() -> None:
    a, b, c = (replace(MACHINE, name=n, weight=w) for n, w in (("a", 1), ("b", 2), ("c", 1)))
    assert budget([a, b, c], 100.0) == (25.0, 25.0)
    assert budget([b, c], 90.0) == (60.0, 60.0)  # a took 10 of its 25
    assert budget([replace(b, patience=1.25), c], 90.0) == (60.0, 75.0)
    assert budget([replace(b, patience=2.0), c], 90.0) == (60.0, 90.0)
    assert budget([replace(a, least_s=40.0), b], 60.0) == (40.0, 40.0)  # worth more: goes first
    assert budget([replace(a, least_s=40.0), b], 30.0) == (30.0, 30.0)


def test_the_plan_of_ten_minutes_leaves_time_for_every_stage() -> None:
    left, stages = 600.0, [s for s in _stages.plan((), 4, True) if s.skip is None]
    for number, one in enumerate(stages):
        plan, limit = budget(stages[number:], left)
        assert plan >= one.least_s, one.name
        left -= plan
    assert left >= 0.0
    assert [one.name for one in stages] == [
        *("machine", "parity", "ops", "run-b32", "run-b64", "run-b4", "profile", "determinism"),
        *("memcheck", "racecheck", "machine-after"),
    ]


# -- stages that do not end well


def test_a_stage_that_fails_costs_itself_alone() -> None:
    out = records(
        stage("good", "found({'x': 1})"),
        stage("exits", "found([1]); print('the reason'); sys.exit(3)"),
        stage("crashes", "os.kill(os.getpid(), 11)"),
        stage("library", "import nothing_of_this_name"),
        stage("skipped", "1 / 0", skip="no program"),
        stage("long", "1 / 0", least_s=1e4),
        stage("last", "found(sys.argv[2])"),
    )
    assert out["good"]["status"] == "done" and out["good"]["data"] == {"x": 1}
    assert out["good"]["why"] is None and "output" not in out["good"]
    assert (out["exits"]["status"], out["exits"]["why"]) == ("failed", "exit code 3")
    assert out["exits"]["data"] == [1] and out["exits"]["output"] == ["the reason"]
    assert (out["crashes"]["status"], out["crashes"]["why"]) == ("failed", "killed by SIGSEGV")
    library = out["library"]
    assert (library["status"], library["why"]) == ("not run", "needs nothing_of_this_name")
    assert (out["skipped"]["status"], out["skipped"]["why"]) == ("not run", "no program")
    assert out["long"]["status"] == "not run" and "it needs 10000" in out["long"]["why"]
    assert 3000.0 < float(out["last"]["data"]) <= 6000.0


def test_a_stage_that_hangs_is_ended_with_all_its_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It hangs once it has found something: then its time is up, however long that took."""
    now = 0.0
    clock = SimpleNamespace(monotonic=lambda: now)
    for name, value in (("_GRACE_S", 0.1), ("_LOOK_S", 0.05), ("time", clock)):
        monkeypatch.setattr(_visit, name, value)
    code = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
found({"parent": os.getpid(), "child": child.pid})
time.sleep(600)
"""
    out = {}

    def report(record: dict[str, Any]) -> bool:
        nonlocal now
        out[record["name"]] = record
        if record["data"]:
            now = 60.0  # of 100, which the two stages share
        return True

    stages = stage("hangs", code), stage("next", "found(1)")
    visit(stages, 100.0, report, lambda stage, limit: None)
    assert out["hangs"]["status"] == "timed out"
    pids = out["hangs"]["data"]
    wait_until(lambda: not alive(pids["parent"]) and not alive(pids["child"]))
    assert out["next"]["data"] == 1


def test_what_a_running_stage_has_found_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_visit, "_LOOK_S", 0.05)
    seen, flag = [], tmp_path / "seen"

    def report(record: dict[str, Any]) -> bool:
        seen.append((record["status"], record["data"]))
        if record["data"] == 7:
            flag.touch()
        return True

    code = f"found(7)\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.01)"
    visit([stage("slow", code)], 600.0, report, lambda stage, limit: None)
    assert ("running", 7) in seen and seen[-1] == ("done", 7)


# -- the report


def reported(folder: Path, *stages: Stage, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    assert gpu_report.main([f"--out={folder}", "--minutes=60", *arguments], [MACHINE, *stages]) == 0
    record: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return record


def test_everything_lies_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"machine": dict(FACTS), "variants": {}, "options": {"batch_size": 4, "block_size": 8,
           "loss_steps": 2}, "dtype": "bfloat16", "baseline": None, "noise": None,
           "notes": ["short run"]}  # fmt: skip
    again = replace(MACHINE, name="machine-after")
    record = reported(
        tmp_path,
        stage("run-b4", f"found({run!r})"),
        stage("breaks", "print('because'); 1 / 0"),
        again,
        arguments=("--commit=abc",),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("report.json", "report.md", "run-b4.json"),
    ]
    assert record["machine"] == FACTS | {"commit": "abc"}
    assert record["ceilings"] == {"before": CEILINGS, "after": CEILINGS}
    statuses = {one["name"]: one["status"] for one in record["stages"]}
    assert statuses == {"machine": "done", "run-b4": "done", "breaks": "failed",
                        "machine-after": "done"}  # fmt: skip
    assert json.loads((tmp_path / "run-b4.json").read_text())["machine"]["commit"] == "abc"
    text = (tmp_path / "report.md").read_text()
    for part in ("# NVIDIA H200", "commit abc", "788 TFLOP/s", "| breaks | failed |", "because",
                 "short run"):  # fmt: skip
        assert part in text, part
    assert "breaks: failed: exit code 1" in capsys.readouterr().out


def test_chosen_stages_come_with_the_machine(tmp_path: Path) -> None:
    stages = stage("a", "found(1)"), stage("b", "found(2)")
    record = reported(tmp_path, *stages, arguments=("--stages", "b"))
    assert [one["name"] for one in record["stages"]] == ["machine", "b"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_cut_off_in_the_middle(number: signal.Signals, tmp_path: Path) -> None:
    """Nothing that was found is lost; but for SIGKILL, nothing goes on running."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nimport _visit, gpu_report, small_visits as t\n_visit._LOOK_S = 0.05\n"
        "slow = t.stage('slow', 'found(os.getpid()); time.sleep(600)')\n"
        "gpu_report.main(sys.argv[1:], [t.MACHINE, t.stage('a', 'found(1)'), slow,"
        " t.stage('never', 'found(2)')])\n"
    )
    path = os.pathsep.join(str(ROOT / name) for name in ("", "bench", "tests"))
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, program, f"--out={out}"], env={**os.environ, "PYTHONPATH": path}
    )

    def record() -> dict[str, Any]:
        return read_json(out / "report.json") or {"stages": []}

    def data() -> dict[str, Any]:
        return {one["name"]: one["data"] for one in record()["stages"]}

    wait_until(lambda: data().get("slow") is not None)
    process.send_signal(number)
    process.wait(300.0)
    pid = data()["slow"]
    if number == signal.SIGKILL:
        os.killpg(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    assert data() == {"machine": None, "a": 1, "slow": pid}
    last = record()["stages"][-1]["status"]
    assert last == ("running" if number == signal.SIGKILL else "interrupted")
    assert "| slow |" in (out / "report.md").read_text()


def test_without_a_gpu_it_ends_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "out"
    assert gpu_report.main([f"--out={out}", "--minutes=2"]) == 2
    assert "this needs a CUDA GPU" in capsys.readouterr().err
    assert [one["name"] for one in read_json(out / "report.json")["stages"]] == ["machine"]


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert gpu_report.main([f"--out={tmp_path}"]) == 2
    assert gpu_report.main([f"--keep={tmp_path / 'none'}"]) == 2
    assert gpu_report.main([f"--out={tmp_path / 'report.json'}"]) == 2
    for wrong in ("--minutes=0", "--sweep=softmax", "--stages=nothing"):
        with pytest.raises(SystemExit, match="2"):
            gpu_report.main([wrong])
    printed = capsys.readouterr().err
    for part in (
        "folder without a report",
        "folder with report.json",
        "File exists",
        "must be positive, got 0",
        "choose from",
        "invalid choice: 'nothing'",
    ):
        assert part in printed, part


def test_it_loads_neither_torch_nor_what_may_be_missing() -> None:
    code = "import sys, gpu_report; print(sorted({'torch', 'triton', 'tyro'} & set(sys.modules)))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.stdout.decode().strip() == "[]", run.stderr.decode()


def test_the_ops_that_can_be_swept_are_those_of_the_sweep() -> None:
    import _sweep

    assert set(gpu_report._SWEEPS) == set(_sweep.OPS)


# -- the last good report


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "report"
    folder.mkdir()
    parity = {"name": "parity", "status": "done", "data": {"failed": 0, "passed": 9}}
    record = {"machine": FACTS | {"commit": "abc"}, "stages": [parity]}
    (folder / "report.json").write_text(json.dumps(record))
    (folder / "report.md").write_text("# report\n")
    for run in gpu_report.RUNS:
        (folder / f"{run}.json").write_text("{}")
    return folder


def test_a_good_report_is_kept(good: Path, tmp_path: Path) -> None:
    home = gpu_report.keep(good, tmp_path / "results")
    assert home == tmp_path / "results" / "nvidia-h200"
    assert {p.name for p in home.iterdir()} == {p.name for p in good.iterdir()}
    (good / "report.md").write_text("# newer\n")
    gpu_report.keep(good, tmp_path / "results")
    assert (home / "report.md").read_text() == "# newer\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["machine"].pop("gpu"), "it names no GPU"),
        (lambda r: r["machine"].update(commit=None), "it names no commit"),
        (lambda r: r["stages"].clear(), "parity: not run"),
        (lambda r: r["stages"][0].update(status="timed out"), "parity: timed out"),
        (lambda r: r["stages"][0]["data"].update(failed=2), "parity: 2 failed, 9 passed"),
        (lambda r: r["stages"][0]["data"].update(passed=0), "parity: 0 failed, 0 passed"),
        (None, "run-b64.json is missing"),
    ],
)
def test_another_is_not(change: Any, reason: str, good: Path, tmp_path: Path) -> None:
    if change is None:
        (good / "run-b64.json").unlink()
    else:
        record = read_json(good / "report.json")
        change(record)
        (good / "report.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=reason):
        gpu_report.keep(good, tmp_path / "results")
    assert not (tmp_path / "results").exists()
