"""Publishes the results of ``run.py`` in docs/speed.md and the README, as tables and charts.

    python bench/publish.py

A folder ``bench/results/<gpu>`` holds a ``run-b<batch size>.json`` for each batch size, and
optionally more runs of the same size, ``run-b<batch size>-<what>.json``. This writes ``speed.png``
and ``loss.png`` next to them, and the text between the markers: all results to docs/speed.md, a
short table of the run closest to 32 sequences to the README. Only results measured on a CUDA GPU
are published.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import cli, machine
from bench._step import report
from bench._step.pictures import PICTURES
from fastgpt._files import parsed_json

BEGIN = "<!-- results: written by bench/publish.py -->"
END = "<!-- results: end -->"
NOTHING = (
    "Not measured yet on a GPU: no figure of one stands here until `python bench/run.py` has\n"
    "produced it.\n"
)
RESULTS, README = machine.ROOT / "bench" / "results", machine.ROOT / "README.md"
PAGE = machine.ROOT / "docs" / "speed.md"
_SHORT = (0, 1, 2, 5, 7)  # variant, tokens/s, speed-up, peak memory, loss

_ALT = {
    "speed": "Tokens per second of each variant",
    "loss": "Loss of each variant, and how far apart they are",
}
_KEYS = (
    "created", "complete", "machine", "options", "dtype", "parameters", "sdpa", "ceilings",
    "variants", "reference_losses",
)  # fmt: skip

Runs = dict[Path, list[dict[str, Any]]]  # the folder of a GPU → its runs, by batch size


def read(results: Path) -> Runs:
    """The runs, sorted by folder name, then by batch size, then the newest first.

    Raises:
        ValueError: a file is not a record of ``run.py`` on a CUDA GPU, or not of the batch size in
            its name; or a folder holds runs of several GPUs.
    """
    found = {}
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        runs = [_run(path) for path in sorted(folder.glob("run-b*.json"))]
        runs.sort(key=lambda run: run["created"], reverse=True)
        runs.sort(key=lambda run: run["options"]["batch_size"])
        names = sorted({machine.name(run["machine"]) for run in runs})
        if len(names) > 1:
            raise ValueError(f"{folder} must hold runs of one GPU, got {', '.join(names)}")
        if runs:
            found[folder] = runs
    return found


def _run(path: Path) -> dict[str, Any]:
    try:
        run = parsed_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    missing = [key for key in _KEYS if not isinstance(run, dict) or key not in run]
    if missing:
        raise ValueError(f"{path} is no record of bench/run.py: it has no {', '.join(missing)}")
    try:
        _check(path, run)
        report.markdown(run), report.notes(run), *_facts(run)  # while the file's name is known
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no record of bench/run.py: {cli.failure_of(error)}") from error
    return run


def _check(path: Path, run: dict[str, Any]) -> None:
    if run["machine"]["device"] != "cuda":
        raise ValueError(f"{path} must be measured on a CUDA GPU, got {run['machine']['device']}")
    if not run["complete"]:
        raise ValueError(f"{path} must be complete, but was cut off")
    expected = f"run-b{run['options']['batch_size']}"
    if path.stem.split("-", 2)[:2] != expected.split("-"):
        raise ValueError(f"{path} must be called {expected}.json, after its batch size")


def text(found: Runs, base: Path) -> str:
    """The text between the markers of docs/speed.md. ``base``: the folder that the links to
    pictures are relative to."""
    lines = [line for folder, runs in found.items() for line in _gpu_section(folder, runs, base)]
    return "\n".join(lines) or NOTHING


def summary(found: Runs, base: Path) -> str:
    """The text between the markers of the README."""
    lines = []
    for folder, runs in found.items():
        run = min(runs, key=lambda run: abs(run["options"]["batch_size"] - 32))
        lines += [f"{report.title(run)}:", "", *report.markdown(run, _SHORT), ""]
        lines.append(_picture(folder, "speed", base))
    return "\n".join(lines) or NOTHING


def _picture(folder: Path, name: str, base: Path) -> str:
    path = Path(os.path.relpath(folder, base), f"{name}.png").as_posix()
    return f"![{_ALT[name]}]({path})\n"


def _gpu_section(folder: Path, runs: list[dict[str, Any]], base: Path) -> Iterator[str]:
    yield from (f"### {machine.name(runs[0]['machine'])}", "")
    for run in runs:
        o = run["options"]
        commit = (run["machine"]["commit"] or "unknown")[:7]
        size = f"{o['batch_size']} sequences of {o['block_size']} tokens"
        yield from (f"**{size}**, commit `{commit}`", "")
        yield from (*report.markdown(run), "")
        yield from (". ".join([*report.notes(run), *_facts(run)]) + ".", "")
    yield from (_picture(folder, name, base) for name in PICTURES)


def _facts(run: dict[str, Any]) -> Iterator[str]:
    """The hardware and software that the results were measured with."""
    found, before, after = run["machine"], run["ceilings"]["before"], run["ceilings"]["after"]
    if run["sdpa"]:
        yield f"SDPA took `{run['sdpa']['operator']}`"
    yield (
        f"The machine's own ceilings before and after: {before['matmul_tflops']:.0f} and "
        f"{after['matmul_tflops']:.0f} TFLOP/s, {before['copy_tb_per_s']:.2f} and "
        f"{after['copy_tb_per_s']:.2f} TB/s"
    )
    versions = {
        "driver": (before["gpu_state"] or {}).get("driver_version"),
        "CUDA": found["cuda"],
        "cuDNN": found["cudnn"],
        "PyTorch": found["torch"],
        "Triton": found["triton"],
    }
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    changed = " with uncommitted changes" if found["uncommitted_changes"] else ""
    yield (
        f"{run['parameters'] / 1e6:.1f}M parameters, {run['dtype']}; {run['created'][:10]}, commit "
        f"`{(found['commit'] or 'unknown')[:12]}`{changed}; {known}"
    )


def _around(path: Path) -> tuple[str, str]:
    """The text before and after the results, including the markers."""
    found = path.read_text()
    if found.count(BEGIN) != 1 or found.count(END) != 1 or found.find(BEGIN) > found.find(END):
        raise ValueError(f"{path.name} must have one line {BEGIN!r} and, after it, one {END!r}")
    return f"{found.partition(BEGIN)[0]}{BEGIN}\n", f"{END}{found.partition(END)[2]}"


def publish(results: Path, readme: Path, page: Path) -> list[Path]:
    """Write the pictures, docs/speed.md and the README, and return their paths."""
    found = read(results)
    texts = {page: text(found, page.parent), readme: summary(found, readme.parent)}
    around = {path: _around(path) for path in texts}
    written = []
    for folder, runs in found.items():
        for name, draw in PICTURES.items():
            written.append(folder / f"{name}.png")
            draw(runs, written[-1])
    for path, (before, after) in around.items():
        partial = path.with_name(path.name + ".partial")
        partial.write_text(before + texts[path] + after)
        partial.replace(path)
    return [*written, *texts]


def main(argv: Sequence[str] = ()) -> int:
    """The exit code: 0, or 2 if results cannot be published."""
    description = "Put the measurements of bench/results into docs/speed.md and the README."
    cli.Parser(description=description).parse_args(argv)
    try:
        written = publish(RESULTS, README, PAGE)
    except cli.USER_ERRORS as error:
        return cli.failed(error)
    for path in written:
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
