"""All that a short visit to a GPU should find out, in the order of its worth.

    python bench/gpu_report.py --minutes 10 --out report
    python bench/gpu_report.py --minutes 30 --sweep attention gemm
    python bench/gpu_report.py --keep report             # later, and without a GPU

The stages: the machine and its ceilings; the tests of every kernel on the GPU (parity); the ops
against PyTorch; training speed at 32, 64 and 4 sequences (``run.py``; the last with 200 losses
against float32); a profile by kernel against the floor; a sweep of launch tables; 250 repeats of
every op, equal to the bit; compute-sanitizer; the ceilings again. Each is a program of its own with
a share of the time that is left: one that crashes, hangs or lacks a library costs that share.

The folder holds ``report.json`` and ``report.md``, written anew after every stage, and
``run-b32.json``, ``run-b64.json``, ``run-b4.json`` as ``run.py`` writes them. It may be cut off at
any time. ``--keep`` makes a good report (no failed test, all three runs complete, a commit) the one
in ``bench/results/<gpu>``.
"""

import argparse
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import _command
import _stages
from _visit import ROOT, Stage, read_json, visit, write_json, write_text
from _visit_report import markdown
from rich.console import Console

RESULTS = ROOT / "bench" / "results"
RUNS = tuple(f"run-b{batch}" for batch in _stages.BATCHES)
_SWEEPS = ("attention", "gemm", "layer_norm", "cross_entropy", "gelu", "embedding", "adamw")


class Report:
    """The folder: what is known so far, on disk after every stage."""

    def __init__(self, folder: Path, minutes: float, commit: str | None) -> None:
        self.record: dict[str, Any] = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "minutes": minutes,
            "machine": None,
            "ceilings": {"before": None, "after": None},
            "stages": [],
        }
        self.runs: dict[str, dict[str, Any]] = {}
        self._folder = folder
        self._commit = commit
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def without_gpu(self) -> bool:
        machine = self.record["machine"]
        return machine is not None and "gpu" not in machine

    def add(self, stage: dict[str, Any]) -> None:
        """A stage's record, in the place of an earlier one of the same stage."""
        name, data = stage["name"], stage["data"]
        if name in ("machine", "machine-after") and data is not None:
            when = "before" if name == "machine" else "after"
            self.record["ceilings"][when] = data.get("ceilings")
            if name == "machine":
                self.record["machine"] = self._with_commit(data["facts"])
            stage = {**stage, "data": None}
        if name in RUNS and data is not None:
            self._with_commit(data["machine"])
            self.runs[name] = data
            write_json(self._folder / f"{name}.json", data)
            stage = {**stage, "data": None}
        before = [one for one in self.record["stages"] if one["name"] != name]
        self.record["stages"] = [*before, stage]
        self._write()

    def _with_commit(self, facts: dict[str, Any]) -> dict[str, Any]:
        """A copy without its history cannot say which commit it is."""
        facts["commit"] = facts["commit"] or self._commit
        return facts

    def _write(self) -> None:
        write_json(self._folder / "report.json", self.record)
        write_text(self._folder / "report.md", markdown(self.record, self.runs))


# ---------------------------------------------------------------------------------- the last good


def not_good(folder: Path) -> list[str]:
    """Why the report in ``folder`` should not stand in bench/results; empty if it may."""
    record = read_json(folder / "report.json")
    if record is None:
        raise FileNotFoundError(f"keep must be a folder with report.json, got {folder}")
    reasons = []
    if record["machine"] is None or "gpu" not in record["machine"]:
        reasons.append("it names no GPU")
    elif not record["machine"]["commit"]:
        reasons.append("it names no commit (--commit)")
    stages = {stage["name"]: stage for stage in record["stages"]}
    parity = stages.get("parity", {})
    if parity.get("status") != "done":
        reasons.append(f"parity: {parity.get('status', 'not run')}")
    elif parity["data"]["failed"] or not parity["data"]["passed"]:
        counts = parity["data"]
        reasons.append(f"parity: {counts['failed']} failed, {counts['passed']} passed")
    for name in RUNS:
        run = read_json(folder / f"{name}.json")
        if run is None:
            reasons.append(f"{name}.json is missing")
        elif not run["complete"]:
            reasons.append(f"{name}.json is not complete")
    return reasons


def slug(gpu: str) -> str:
    """ "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def keep(folder: Path, results: Path = RESULTS) -> Path:
    """Copy a good report; ValueError where it is none."""
    reasons = not_good(folder)
    if reasons:
        raise ValueError(f"{folder} is not kept: {'; '.join(reasons)}")
    home = results / slug(read_json(folder / "report.json")["machine"]["gpu"])
    home.mkdir(parents=True, exist_ok=True)
    for name in (*(f"{run}.json" for run in RUNS), "report.md", "report.json"):
        write_text(home / name, (folder / name).read_text())
    return home


# ------------------------------------------------------------------------------------- command line


def parse(argv: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all stages (default: 10)")
    parser.add_argument(
        "--out", type=Path, help="a folder without a report (default: in bench/out)"
    )
    parser.add_argument("--stages", nargs="+", choices=names, metavar="STAGE",
                        help=f"these alone: {', '.join(names)}")  # fmt: skip
    parser.add_argument("--sweep", nargs="+", default=(), choices=_SWEEPS, metavar="OP",
                        help=f"launch tables to sweep: {', '.join(_SWEEPS)}")  # fmt: skip
    parser.add_argument("--commit", help="of this tree, where git does not know it")
    parser.add_argument("--keep", type=Path, metavar="FOLDER",
                        help="measure nothing; put that report into bench/results")  # fmt: skip
    options = parser.parse_args(argv)
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    return options


def _interrupted(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] | None = None) -> int:
    """The exit code: 0, or 2 for a wrong argument or without a CUDA GPU. ``stages``: others than
    those of ``_stages.plan``."""
    names = [stage.name for stage in stages or _stages.plan((), 0, True)]
    o = parse(argv, names)
    if o.keep is not None:
        try:
            print(f"kept as {keep(o.keep)}")
        except (ValueError, FileNotFoundError) as error:
            return _command.failed(error)
        return 0
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S")
    folder = o.out or ROOT / "bench" / "out" / f"report-{now}"
    if (folder / "report.json").exists():
        return _command.failed(
            f"--out must be a folder without a report, but {folder / 'report.json'} exists"
        )
    if stages is None:
        workers = min(16, os.cpu_count() or 1)
        has_sanitizer = shutil.which("compute-sanitizer") is not None
        stages = _stages.plan(tuple(o.sweep), workers, has_sanitizer)
    # Without its machine a figure says nothing.
    chosen = [s for s in stages if o.stages is None or s.name in (*o.stages, "machine")]
    try:
        report = Report(folder, o.minutes, o.commit)
    except OSError as error:
        return _command.failed(f"--out={folder}: {error}")
    console = Console(highlight=False)

    def done(record: dict[str, Any]) -> bool:
        report.add(record)
        if record["status"] != "running":
            why = f": {record['why']}" if record["why"] else ""
            console.print(f"{record['name']}: {record['status']}{why}", soft_wrap=True)
        return not report.without_gpu

    before = signal.signal(signal.SIGTERM, _interrupted)
    try:
        visit(
            chosen,
            60 * o.minutes,
            done,
            lambda stage, limit: console.print(f"{stage.name}: at most {limit:.0f} s"),
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    console.print(f"wrote {folder / 'report.md'}", soft_wrap=True)
    if report.without_gpu:
        return _command.failed("this needs a CUDA GPU; see report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
