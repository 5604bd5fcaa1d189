"""Running one program after another within a given time, such that at any moment what was found so
far lies on disk: the part of ``gpu_report.py`` that knows nothing of GPUs.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_TAIL = 30  # lines of a program's output that are kept when it did not end well
_GRACE_S = 3.0  # to end by itself when told to
_LOOK_S = 5.0  # between two looks at what a running program has found
_MISSING = re.compile(r"^ModuleNotFoundError: No module named '([\w.]+)'", re.M)


def write_text(path: Path, text: str) -> None:
    """All of it or nothing: a program that is cut off leaves the old file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """None without such a file."""
    return json.loads(path.read_text()) if path.is_file() else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """What processes appended, a line each; a last line that was cut off does not count."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]


@dataclass(frozen=True)
class Stage:
    """A program of its own, since it may crash, hang, or end the GPU's use for its process.

    ``command(folder, seconds)``: the program, which leaves in ``folder`` what it finds as soon as
    it finds it, and plans with that many seconds. ``collect(folder)``: that as JSON, complete or
    not. ``weight``: its share of the time among the stages still to come. It is not begun with less
    than ``least_s`` left, and ended after ``patience`` times what it was to plan with. ``skip``:
    why it is not run at all.
    """

    name: str
    command: Callable[[Path, float], Sequence[str]]
    collect: Callable[[Path], Any]
    weight: float
    least_s: float
    patience: float = 1.0
    skip: str | None = None


def budget(stages: Sequence[Stage], left: float) -> tuple[float, float]:
    """Seconds that the first of the stages plans with, and after which it is ended, when there are
    ``left`` for all of them: what earlier ones did not use is spread over those that follow."""
    first = stages[0]
    share = left * first.weight / sum(stage.weight for stage in stages)
    plan = min(left, max(share, first.least_s))
    return plan, min(left, plan * first.patience)


def run_stage(
    stage: Stage, plan: float, limit: float, report: Callable[[dict[str, Any]], object]
) -> dict[str, Any]:
    """The record: ``status`` is "done", "failed", "timed out", "interrupted" or "not run", ``why``
    says more. Every few seconds ``report`` gets what there is, with the status "running"."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stage-") as temporary:
        folder = Path(temporary)
        log = folder / "output.txt"

        def record(status: str, why: str | None) -> dict[str, Any]:
            return {
                "name": stage.name,
                "status": status,
                "why": why,
                "planned_s": round(plan, 1),
                "seconds": round(time.monotonic() - start, 1),
                "data": stage.collect(folder),
            }

        def look() -> None:
            report(record("running", None))

        status, why = _run(list(stage.command(folder, plan)), limit, log, look)
        output = log.read_text(errors="replace")
        missing = _MISSING.findall(output) if status == "failed" else []
        if missing:
            status, why = "not run", f"needs {missing[-1]}"
        if status == "done":
            return record(status, why)
        return record(status, why) | {"output": output.splitlines()[-_TAIL:]}


def _run(
    command: list[str], limit: float, log: Path, look: Callable[[], None]
) -> tuple[str, str | None]:
    """In a process group of its own, all of which is ended with it."""
    search = [str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}
    environment["PYTHONUNBUFFERED"] = "1"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = _wait(process, limit, look)
        except subprocess.TimeoutExpired:
            return "timed out", f"ended after {limit:.0f} s"
        except KeyboardInterrupt:
            return "interrupted", None
        finally:  # an interrupt, too, leaves nothing running
            _end(process)
    if code == 0:
        return "done", None
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name}"
    return "failed", f"exit code {code}"


def _wait(process: subprocess.Popen[bytes], limit: float, look: Callable[[], None]) -> int:
    end = time.monotonic() + limit
    while True:
        left = end - time.monotonic()
        try:
            return process.wait(max(0.0, min(left, _LOOK_S)))
        except subprocess.TimeoutExpired:
            if left <= _LOOK_S:
                raise
            look()


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break  # the whole group has ended
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def visit(
    stages: Sequence[Stage],
    seconds: float,
    report: Callable[[dict[str, Any]], bool],
    begin: Callable[[Stage, float], None],
) -> None:
    """Run the stages in their order within ``seconds``.

    Args:
        report: gets a stage's record every few seconds while it runs, with the status "running",
            and when it has ended; False then ends the visit, as an interrupt does.
        begin: hears of a stage and of the seconds after which it will be ended.
    """
    end = time.monotonic() + seconds
    for number, stage in enumerate(stages):
        left = end - time.monotonic()
        why = stage.skip
        if why is None and left < stage.least_s:
            why = f"{max(left, 0):.0f} s were left, it needs {stage.least_s:.0f}"
        if why is not None:
            record = {"name": stage.name, "status": "not run", "why": why, "data": None}
        else:
            going = [stage, *(later for later in stages[number + 1 :] if later.skip is None)]
            plan, limit = budget(going, left)
            begin(stage, limit)
            record = run_stage(stage, plan, limit, report)
        if not report(record) or record["status"] == "interrupted":
            return


def python(*arguments: object) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *map(str, arguments)]
