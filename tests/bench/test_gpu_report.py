"""bench/gpu_report.py: time shares, files, parts that crash, hang or lack a library."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_report
from bench._harness import cli
from bench._step.variants import Options
from bench.gpu_report import Part, run_parts, share_s

ROOT = Path(__file__).resolve().parents[2]
GELU = "tests/kernels/test_gelu.py"
HANG_GUARD_S = 600.0


def part(name: str, code: str, weight: float = 1.0, least_s: float = 0.0) -> Part:
    return Part(name, (sys.executable, "-c", code, "{out}"), weight, least_s)


def report(folder: Path, *parts: Part, commit: str | None = None) -> Any:
    run_parts(parts, folder, 10.0, commit)
    rows = json.loads((folder / "report.json").read_text())["parts"]
    return {row["name"]: row for row in rows}


def test_time_that_was_not_used_goes_to_the_parts_that_follow() -> None:
    a, b, c = part("a", "", 1), part("b", "", 2), part("c", "", 1)
    assert share_s([a, b, c], 100.0) == 25.0
    assert share_s([b, c], 90.0) == 60.0  # a used only 10 of its 25
    assert share_s([part("a", "", 1, 40.0), b], 60.0) == 40.0  # worth more: runs first
    assert share_s([part("a", "", 1, 40.0), b], 30.0) == 30.0


def test_ten_minutes_leave_time_for_every_part() -> None:
    left, parts = 600.0, gpu_report.parts()
    for number, one in enumerate(parts):
        limit = share_s(parts[number:], left)
        assert limit >= one.least_s, one.name
        left -= limit
    assert left >= 0.0


def test_a_part_that_fails_ends_alone(tmp_path: Path) -> None:
    writes = "import json, pathlib, sys; machine = {'commit': None}; "
    writes += (
        "pathlib.Path(sys.argv[1], 'run-b4.json').write_text(json.dumps({'machine': machine}))"
    )
    out = report(
        tmp_path,
        part("run-b4", writes),
        part("exits", "import sys; print('the reason'); sys.exit(3)"),
        part("crashes", "import os; os.kill(os.getpid(), 11)"),
        Part("program", ("env", "no-such-program"), 1.0, 0.0),
        part("long", "1 / 0", least_s=1e6),
        part("last", ""),
        commit="abc",  # for a tree without git
    )
    assert out["run-b4"]["status"] == "done"
    assert json.loads((tmp_path / "run-b4.json").read_text())["machine"]["commit"] == "abc"
    assert (out["exits"]["status"], out["exits"]["why"]) == ("failed", "exit code 3")
    assert out["exits"]["output"] == ["the reason"]
    assert (tmp_path / "exits.log").read_text() == "the reason\n"
    assert (out["crashes"]["status"], out["crashes"]["why"]) == ("failed", "killed by SIGSEGV")
    assert "no-such-program" in out["program"]["output"][0]
    assert out["long"]["status"] == "not run" and "it needs 1000000" in out["long"]["why"]
    assert out["last"]["status"] == "done"
    shown = (tmp_path / "report.md").read_text()
    assert "commit abc" in shown and "| exits | failed |" in shown and "the reason" in shown


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Any) -> None:
    end = time.monotonic() + HANG_GUARD_S
    while not condition():
        assert time.monotonic() < end, "hangs"
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_a_part_that_hangs_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, pathlib, signal, subprocess, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1], "pids").write_text(f"{os.getpid()} {child.pid} .")
time.sleep(600)
"""
    said = tmp_path / "pids"

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        """Times out once the program has written its process ids."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None and timeout > 1.0:
                wait_until(lambda: said.exists() and said.read_text().endswith("."))
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    monkeypatch.setattr(gpu_report, "_GRACE_S", 0.1)
    monkeypatch.setattr(subprocess, "Popen", Popen)
    out = report(tmp_path, part("hangs", code))
    assert out["hangs"]["status"] == "timed out"
    pids = [int(word) for word in said.read_text().split()[:2]]
    wait_until(lambda: not any(map(alive, pids)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_report_that_is_told_to_end_leaves_nothing_running(tmp_path: Path, number: int) -> None:
    """Ended by Ctrl-C or by ``timeout``."""
    child = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], 'pid').write_text("
    child += "f'{os.getpid()} .'); time.sleep(600)"
    code = f"""
import sys, torch
from bench import gpu_report
torch.cuda.device_count = lambda: 1
command = (sys.executable, "-c", {child!r}, "{{out}}")
gpu_report.parts = lambda: [gpu_report.Part(name, command, 1.0) for name in ("first", "second")]
gpu_report.main(["--out", {str(tmp_path)!r}])
"""
    path = str(ROOT)
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    said = tmp_path / "pid"
    wait_until(lambda: said.exists() and said.read_text().endswith("."))
    process.send_signal(number)
    assert process.wait(HANG_GUARD_S) == 0
    (row,) = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert (row["name"], row["status"]) == ("first", "interrupted")
    assert not alive(int(said.read_text().split()[0]))


def test_the_commands_exist() -> None:
    """pytest's commands collect the GPU tests; those of run.py have valid options."""
    for one in gpu_report.parts():
        if one.name == "parity":
            command = [*one.command, "--collect-only", "-qq", "-n0", GELU]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            tests = [line for line in done.stdout.splitlines() if "::" in line]
            assert tests and all("[cuda" in test for test in tests)
        modules = [word for word in one.command if word.startswith("bench.")]
        assert all(map(importlib.util.find_spec, modules))
        if modules == ["bench.run"]:
            options = cli.options(Options(), one.command[3:])
            assert one.name == f"run-b{options.batch_size}" and options.out == Path("{out}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_report.main([f"--out={tmp_path / 'new'}"]) == 2
    assert "this needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
