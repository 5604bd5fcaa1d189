"""Stages of a visit to a GPU that take a moment and need none."""

import json
import time
from pathlib import Path
from typing import Any

from _visit import Stage, python, read_json, visit

FACTS = {
    "device": "cuda",
    "gpu": "NVIDIA H200",
    "commit": None,
    "uncommitted_changes": None,
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
    "cudnn": 91300,
    "python": "3.12.3",
}
CEILINGS = {"matmul_tflops": 788.0, "matmul": "8192", "copy_tb_per_s": 4.3, "copy": "2 GiB"}


def json_of(folder: Path) -> Any:
    return read_json(folder / "found.json")


def stage(name: str, code: str, **fields: Any) -> Stage:
    """A program that runs ``code``; what it finds goes into found.json in ``folder``."""
    before = (
        "import json, os, sys, time\nfrom pathlib import Path\n"
        "def found(x): (Path(sys.argv[1]) / 'found.json').write_text(json.dumps(x))\n"
    )
    options: dict[str, Any] = {"weight": 1.0, "least_s": 0.0, "collect": json_of} | fields
    return Stage(
        name=name,
        command=lambda folder, seconds: python("-c", before + code, folder, seconds),
        **options,
    )


MACHINE = stage("machine", f"found({{'facts': {FACTS!r}, 'ceilings': {CEILINGS!r}}})")


def records(*stages: Stage, seconds: float = 6000.0) -> dict[str, dict[str, Any]]:
    """Of a visit: the last record of each stage. Its time is enough on a machine that is busy."""
    out: dict[str, dict[str, Any]] = {}

    def report(record: dict[str, Any]) -> bool:
        json.dumps(record, allow_nan=False)
        out[record["name"]] = record
        return True

    visit(stages, seconds, report, lambda stage, limit: None)
    return out


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Any, seconds: float = 300.0) -> None:
    """What takes that long will never happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
