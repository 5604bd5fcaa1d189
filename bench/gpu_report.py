"""Runs everything worth measuring on a GPU in limited time, the most important parts first.

    python bench/gpu_report.py --minutes 10 --out report
    python bench/gpu_report.py --only parity run-b32 profile

Each part is a separate command that writes its files into the folder as it runs: the GPU tests of
every kernel (parity), training speed at 32, 4 and 64 sequences (``run.py``; at 4 with 200 losses
against float32), a profile by kernel, the ops against PyTorch, whether 250 repeats of every op are
bitwise equal, and compute-sanitizer. A part that crashes, hangs or lacks a program does not stop
the others. Unused time goes to the parts that follow. NAME.log holds a part's output; report.json
and report.md hold each part's outcome.

To publish the speeds, move run-b*.json to ``bench/results/<gpu>`` and run ``bench/publish.py``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import cli

ROOT = Path(__file__).resolve().parent.parent

_TAIL = 30  # lines of output in the report of a part that failed
_GRACE_S = 5.0  # between a signal and the next, stronger one


@dataclass(frozen=True)
class Part:
    """``{out}`` in ``command`` stands for the folder. ``weight``: its share of the time among the
    remaining parts. It does not start with less than ``least_s`` seconds left."""

    name: str
    command: tuple[str, ...]
    weight: float
    least_s: float = 30.0


def parts() -> list[Part]:
    """All parts, the most important first."""
    module = sys.executable, "-m"
    pytest = *module, "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"
    workers = str(min(16, os.cpu_count() or 1))
    parity = *pytest, "-m", "gpu and not slow", "-n", workers, "--maxprocesses=16"
    run = *module, "bench.run", "--out={out}"
    determinism = *module, "bench._ops.determinism"
    # Without PyTorch's caching allocator, whose large blocks would hide an out-of-bounds access.
    sanitize = "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer"
    return [
        Part("parity", (*parity, "--continue-on-collection-errors"), 130),
        Part("run-b32", (*run, "--batch_size=32"), 180, 60),
        Part("profile", (*module, "bench._step.profile", "{out}"), 25, 15),
        Part("run-b4", (*run, "--batch_size=4", "--loss_steps=200"), 110, 60),
        Part("ops", (*pytest, "-n0", "bench"), 100),
        Part("run-b64", (*run, "--batch_size=64"), 200, 60),
        Part("determinism", (*determinism, "{out}"), 25, 15),
        *(
            Part(tool, (*sanitize, "--tool", tool, "--error-exitcode", "9", *determinism), 30, 10)
            for tool in ("memcheck", "racecheck")
        ),
    ]


def share_s(going: Sequence[Part], left: float) -> float:
    """The time limit in seconds of the first remaining part."""
    share = left * going[0].weight / sum(part.weight for part in going)
    return min(left, max(share, going[0].least_s))


def run_part(part: Part, folder: Path, limit: float) -> dict[str, Any]:
    """Run a part for at most ``limit`` seconds and return its record. ``status`` is "done",
    "failed", "timed out" or "interrupted"; unless "done", ``output`` holds its last lines."""
    start = time.monotonic()
    log = folder / f"{part.name}.log"
    status, why = _executed([a.replace("{out}", str(folder)) for a in part.command], log, limit)
    seconds = round(time.monotonic() - start, 1)
    record: dict[str, Any] = {"name": part.name, "status": status, "why": why, "seconds": seconds}
    if status != "done":
        record["output"] = log.read_text(errors="replace").splitlines()[-_TAIL:]
    return record


def _executed(command: list[str], log: Path, limit: float) -> tuple[str, str]:
    """Status and reason. The whole process group has ended when this returns."""
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search), "PYTHONUNBUFFERED": "1"}
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
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return "timed out", f"ended after {limit:.0f} s"
        except KeyboardInterrupt:
            return "interrupted", ""
        finally:
            _end(process)
    if code == 0:
        return "done", ""
    return "failed", f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process group. On SIGINT, run.py and pytest write their results so far."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return  # the whole group has ended
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue


def _markdown(record: dict[str, Any]) -> str:
    lines = [f"# {record['created']}, commit {record['commit'] or 'unknown'}", ""]
    lines += ["| part | status | s | |", "|---|---|---|---|"]
    for row in record["parts"]:
        lines.append(f"| {row['name']} | {row['status']} | {row['seconds']} | {row['why']} |")
    for row in record["parts"]:
        if "output" in row:
            lines += ["", f"## End of {row['name']}.log", "", "```", *row["output"], "```"]
    return "\n".join(lines) + "\n"


def _name_commit(folder: Path, name: str, commit: str | None) -> None:
    """Set the commit in a run's record if run.py could not: in a copy of the tree without .git."""
    path = folder / f"{name}.json"
    if commit is not None and name.startswith("run-") and path.exists():
        run = json.loads(path.read_text())
        run["machine"]["commit"] = run["machine"]["commit"] or commit
        cli.write_json(path, run)


def run_parts(chosen: Sequence[Part], folder: Path, minutes: float, commit: str | None) -> None:
    """Run the parts in order within the time limit."""
    end = time.monotonic() + 60 * minutes
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record: dict[str, Any] = {"created": created, "commit": commit, "parts": []}
    for number, part in enumerate(chosen):
        left = end - time.monotonic()
        if left < part.least_s:
            why = f"{max(left, 0):.0f} s left, it needs {part.least_s:.0f}"
            row = {"name": part.name, "status": "not run", "why": why, "seconds": 0.0}
        else:
            limit = share_s(chosen[number:], left)
            print(f"{part.name}: at most {limit:.0f} s", flush=True)
            row = run_part(part, folder, limit)
            _name_commit(folder, part.name, commit)
        record["parts"].append(row)
        cli.write_json(folder / "report.json", record)
        (folder / "report.md").write_text(_markdown(record))
        print(f"{part.name}: {row['status']} {row['why']}", flush=True)
        if row["status"] == "interrupted":
            return


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a wrong argument or without a CUDA GPU."""
    every = parts()
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="total time (default: 10)")
    parser.add_argument("--out", type=Path, help="folder without a report (default: in bench/out)")
    names = [part.name for part in every]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART",
                        help=f"parts to run, of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--commit", help="commit of this tree, if it has no git history")
    o = parser.parse_args(argv)
    if not 0 < o.minutes < float("inf"):
        return cli.failed(f"minutes must be positive and finite, got {o.minutes:g}")
    import torch  # late: --help needs no PyTorch

    if torch.cuda.device_count() == 0:
        return cli.failed("this needs a CUDA GPU, and PyTorch finds none")
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")
    folder = (o.out or ROOT / "bench" / "out" / f"report-{now}").resolve()
    if (folder / "report.json").exists():
        return cli.failed(
            f"--out must be a folder without a report, but {folder / 'report.json'} exists"
        )
    try:
        cli.made_folder(folder)
    except OSError as error:
        return cli.failed(error)
    # Treat signals like Ctrl-C: end the running part and report that it was interrupted.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    run_parts([p for p in every if o.only is None or p.name in o.only], folder, o.minutes, o.commit)
    print(f"wrote {folder / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
