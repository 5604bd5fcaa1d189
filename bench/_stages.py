"""The stages of ``gpu_report.py``, each a program of its own. Some are programs of this file:

    python bench/_stages.py machine FOLDER SECONDS
    python bench/_stages.py run-b32 FOLDER SECONDS

It leaves what it finds in FOLDER, and SECONDS are what it should plan with.
"""

import functools
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from _visit import Stage, python, read_json, read_json_lines, write_json

_BENCH = Path(__file__).resolve().parent

BATCHES = (32, 64, 4)

# Seconds of a run of run.py on an H200, guessed: a part that does not depend on the batch (above
# all torch.compile), and one for each sequence of the batch.
_FULL_RUN_S = (110.0, 5.5)
_SHORT_RUN = ("--loss_steps=20", "--warmup=10", "--rounds=3", "--steps=10")
_NOT_IN_SHORT_RUNS = ("naive", "huggingface", "fastgpt_recompute", "fastgpt_compile")
_LONG_LOSS = "--loss_steps=200"  # at the smallest batch, where they cost least


# ------------------------------------------------------------------------------- machine, ceilings


def machine(folder: Path, seconds: float) -> int:
    """Facts, and what the machine reaches."""
    import _machine
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    write_json(folder / "machine.json", {"facts": _machine.facts(device)})
    if device.type == "cpu":
        print("no CUDA GPU")
        return 1
    found = {"facts": _machine.facts(device), "ceilings": _machine.ceilings(device)}
    write_json(folder / "machine.json", found)
    return 0


# ------------------------------------------------------------------------------------------ parity


def _pytest(folder: Path) -> list[str]:
    results = f"--results-to={folder / 'results.jsonl'}"
    return python("-m", "pytest", "-q", "-p", "_visit_plugin", "-p", "no:cacheprovider", results)


def parity_command(folder: Path, seconds: float, workers: int, paths: Iterable[str]) -> list[str]:
    """Every test that needs a GPU. A file that cannot be imported costs its own tests alone."""
    return [
        *_pytest(folder),
        *("-m", "gpu and not slow", "--continue-on-collection-errors", "--tb=short"),
        *("-n", str(workers), f"--maxprocesses={workers}", *paths),
    ]


def parity(folder: Path) -> dict[str, Any]:
    """Counts by op and dtype; the failing tests; those that were begun and not ended."""
    started: list[str] = []
    ended: dict[str, dict[str, Any]] = {}
    for result in read_json_lines(folder / "results.jsonl"):
        test = result["test"]
        if result["outcome"] == "started":
            started.append(test)
        elif ended.get(test, {}).get("outcome") != "failed":  # what failed stays so
            ended[test] = result
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for test, result in ended.items():
        counts[kind_of_test(test)][result["outcome"]] += 1
    return {
        "counts": {kind: dict(count) for kind, count in sorted(counts.items())},
        **{
            outcome: sum(count[outcome] for count in counts.values())
            for outcome in ("passed", "failed", "skipped")
        },
        "failures": [
            {"test": test, "message": result["message"]}
            for test, result in ended.items()
            if result["outcome"] == "failed"
        ],
        "not_ended": [test for test in dict.fromkeys(started) if test not in ended],
    }


def kind_of_test(test: str) -> str:
    """ "tests/test_mlp.py::test_parity[cuda-torch.float16-8]" → "mlp float16"."""
    op = Path(test.partition("::")[0]).stem.removeprefix("test_")
    dtype = re.search(r"bfloat16|float16|float32", test.partition("[")[2])
    return f"{op} {dtype[0]}" if dtype else op


# --------------------------------------------------------------------------------- op benchmarks


def ops_command(folder: Path, seconds: float, paths: Iterable[str] = ("bench",)) -> list[str]:
    return [*_pytest(folder), "-n0", "--continue-on-collection-errors", "--tb=short", *paths]


def ops(folder: Path) -> dict[str, Any]:
    """The rows that were measured, and those that failed."""
    results = read_json_lines(folder / "results.jsonl")
    return {
        "rows": [result["figures"] for result in results if "figures" in result],
        "failures": [
            {"test": result["test"], "message": result["message"]}
            for result in results
            if result["outcome"] == "failed"
        ],
    }


# ------------------------------------------------------------------------------------------- runs


def run(folder: Path, seconds: float, batch_size: int) -> int:
    """run.py in full if there is time, else shorter."""
    import run as bench
    from _training import Options

    fixed, each = _FULL_RUN_S
    arguments = [f"--batch_size={batch_size}", f"--out={folder / 'run'}"]
    if seconds < fixed + each * batch_size:
        variants = [name for name in Options().variants if name not in _NOT_IN_SHORT_RUNS]
        arguments += ["--variants", *variants, *_SHORT_RUN]
    if batch_size == min(BATCHES):
        arguments = [a for a in arguments if not a.startswith("--loss_steps")] + [_LONG_LOSS]
    else:  # a hundred steps in float32 take as long as everything else
        arguments.append("--reference=False")
    return bench.main(arguments)


def run_record(folder: Path) -> dict[str, Any] | None:
    return read_json(folder / "run" / "run.json")


# -------------------------------------------------------------------------------------- sanitizer


def sanitizer_command(folder: Path, seconds: float, tool: str) -> list[str]:
    """PyTorch's allocator hands out parts of large blocks, past whose ends nobody would notice."""
    return [
        *("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool),
        *("--error-exitcode", "9", "--log-file", str(folder / "sanitizer.txt")),
        *python(_BENCH / "_determinism.py"),
    ]


def sanitizer(folder: Path) -> dict[str, Any]:
    """What the tool says, the errors first."""
    path = folder / "sanitizer.txt"
    text = path.read_text(errors="replace") if path.is_file() else ""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    output = folder / "output.txt"
    ran = re.findall(r"^op: (\w+)", output.read_text(errors="replace"), re.M)
    return {"summary": summary[-1] if summary else None, "ops": ran, "log": text.splitlines()[:60]}


# -------------------------------------------------------------------------------------- all of them


def plan(sweeps: tuple[str, ...], workers: int, has_sanitizer: bool) -> list[Stage]:
    """All stages in the order of worth."""

    def own(name: str) -> Callable[[Path, float], list[str]]:
        return lambda folder, seconds: python(_BENCH / "_stages.py", name, folder, seconds)

    def beside(file: str) -> Callable[[Path, float], list[str]]:
        return lambda folder, seconds: python(_BENCH / file, folder)

    def json_of(name: str) -> Callable[[Path], Any]:
        return lambda folder: read_json(folder / name)

    no_sanitizer = None if has_sanitizer else "compute-sanitizer is not on the PATH"
    return [
        Stage("machine", own("machine"), json_of("machine.json"), 15, 30),
        Stage(
            "parity",
            functools.partial(parity_command, workers=workers, paths=("tests",)),
            parity,
            130,
            30,
        ),
        Stage("ops", ops_command, ops, 100, 30),
        *(
            Stage(f"run-b{batch}", own(f"run-b{batch}"), run_record, weight, 45, patience=1.6)
            for batch, weight in zip(BATCHES, (110, 150, 90), strict=True)
        ),
        Stage("profile", beside("_profile.py"), json_of("profile.json"), 25, 15),
        Stage(
            "sweep",
            lambda folder, seconds: python(
                *(_BENCH / "sweep.py", *sweeps, f"--json={folder / 'sweep.json'}"),
                f"--minutes={seconds / 60}",
            ),
            json_of("sweep.json"),
            120,
            30,
            skip=None if sweeps else "no op was named (--sweep)",
        ),
        Stage("determinism", beside("_determinism.py"), json_of("determinism.json"), 25, 15),
        *(
            Stage(
                tool,
                functools.partial(sanitizer_command, tool=tool),
                sanitizer,
                30,
                20,
                patience=1.5,
                skip=no_sanitizer,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Stage("machine-after", own("machine"), json_of("machine.json"), 12, 8),
    ]


PROGRAMS: dict[str, Callable[[Path, float], int]] = {
    "machine": machine,
    **{f"run-b{batch}": functools.partial(run, batch_size=batch) for batch in BATCHES},
}

if __name__ == "__main__":
    program, folder, seconds = sys.argv[1:]
    sys.exit(PROGRAMS[program](Path(folder), float(seconds)))
