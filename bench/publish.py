"""Puts what ``run.py`` measured into the README, as tables and as pictures.

    python bench/publish.py           # writes README.md between its markers, and the pictures
    python bench/publish.py --check   # writes nothing; exit code 1 where something is out of date

A folder ``bench/results/<gpu>`` holds one ``run-b<batch size>.json`` for each batch size; beside
them come ``speed.png``, ``loss.png`` and ``memory.png``. A picture carries the digest of the files
from which it was made. Nothing is published that was not measured on a CUDA GPU.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import cli, machine
from bench._step import pictures

BEGIN = "<!-- results: written by bench/publish.py -->"
END = "<!-- results: end -->"
NOTHING = (
    "Not measured yet on a GPU: no figure of one stands here until `python bench/run.py` has\n"
    "produced it.\n"
)
RESULTS, README = machine.ROOT / "bench" / "results", machine.ROOT / "README.md"

_PICTURES: dict[str, Callable[[list[dict[str, Any]], Path, str], None]] = {
    "speed.png": pictures.speed,
    "loss.png": pictures.loss,
    "memory.png": pictures.memory,
}
_ALT = {
    "speed.png": "Tokens per second of each variant",
    "loss.png": "Loss of each variant, and its distance from float32",
    "memory.png": "Peak memory of each variant",
}
_HEADER = (
    "variant", "tokens/s", "p10 – p90", "speed-up", "peak GB", "first step s, cold / warm", "loss",
    "off fp32",
)  # fmt: skip


@dataclass
class Options:
    """Make README.md's tables, and the pictures, from bench/results."""

    check: bool = False
    """Write nothing: say what is out of date, and end with exit code 1 if anything is."""


@dataclass(frozen=True)
class Results:
    """The runs on one GPU, by batch size."""

    folder: Path
    runs: list[dict[str, Any]]
    digest: str  # of the files


# -------------------------------------------------------------------------------------- reading


def read(folder: Path) -> list[Results]:
    """What was measured, in the order of the folders' names.

    Raises:
        ValueError: a file is no record of ``run.py`` on a CUDA GPU, or not of the batch size in
            its name; or a folder holds runs of several GPUs.
    """
    found = []
    for gpu in sorted(path for path in folder.glob("*") if path.is_dir()):
        files = sorted(gpu.glob("run-b*.json"), key=lambda path: (len(path.name), path.name))
        if files:
            runs = [_run(path) for path in files]
            names = sorted({machine.name(run["machine"]) for run in runs})
            if len(names) > 1:
                raise ValueError(f"{gpu} must hold runs of one GPU, got {', '.join(names)}")
            digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
            found.append(Results(gpu, runs, digest))
    return found


def _run(path: Path) -> dict[str, Any]:
    try:
        run = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    keys = (
        "created", "complete", "machine", "options", "dtype", "ceilings", "variants",
        "reference_losses",
    )  # fmt: skip
    missing = [key for key in keys if key not in run] if isinstance(run, dict) else list(keys)
    if missing:
        raise ValueError(f"{path} is no record of bench/run.py: it has no {', '.join(missing)}")
    if run["machine"]["device"] != "cuda":
        raise ValueError(f"{path} must be measured on a CUDA GPU, got {run['machine']['device']}")
    if not run["complete"]:
        raise ValueError(f"{path} must be complete, but was cut off")
    expected = f"run-b{run['options']['batch_size']}.json"
    if path.name != expected:
        raise ValueError(f"{path} must be called {expected}, after its batch size")
    return run


# ------------------------------------------------------------------------------------------ text


def text(found: list[Results], root: Path) -> str:
    """What stands between the markers. ``root``: what links to pictures are relative to."""
    return "\n".join(line for results in found for line in _of_gpu(results, root)) or NOTHING


def _of_gpu(results: Results, root: Path) -> Iterator[str]:
    facts = [_facts(run) for run in results.runs]
    shared = len(set(facts)) == 1
    yield from (f"### {machine.name(results.runs[0]['machine'])}", "")
    if shared:
        yield from (facts[0], "")
    for run, fact in zip(results.runs, facts, strict=True):
        o = run["options"]
        yield from (f"**{o['batch_size']} sequences of {o['block_size']} tokens**", "")
        yield from ([] if shared else [fact, ""])
        yield "| " + " | ".join(_HEADER) + " |"
        yield "|---" + "|--:" * (len(_HEADER) - 1) + "|"
        yield from ("| " + " | ".join(row) + " |" for row in _rows(run))
        yield from ("", _basis(run), "")
    folder = results.folder.relative_to(root).as_posix()
    yield from (f"![{_ALT[name]}]({folder}/{name})\n" for name in _PICTURES)


def _facts(run: dict[str, Any]) -> str:
    """What the figures were measured with."""
    machine, state = run["machine"], run["ceilings"]["before"]["gpu_state"] or {}
    commit = (machine["commit"] or "unknown")[:12]
    changed = " with uncommitted changes" if machine["uncommitted_changes"] else ""
    versions = {
        "driver": state.get("driver_version"),
        "CUDA": machine["cuda"],
        "cuDNN": machine["cudnn"],
        "PyTorch": machine["torch"],
        "Triton": machine["triton"],
    }
    known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{run['parameters'] / 1e6:.1f}M parameters, {run['dtype']}; {run['created'][:10]}, commit "
        f"`{commit}`{changed}; {known}."
    )


def _rows(run: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for variant in run["variants"].values():
        speed, peak = variant["tokens_per_s"], variant["peak_memory_bytes"]
        starts = [_number(variant[key], "{:.1f}") for key in ("cold_start_s", "warm_start_s")]
        yield (
            variant["label"],
            variant["failure"] or f"{speed['median']:,.0f}",
            f"{speed['p10']:,.0f} – {speed['p90']:,.0f}" if speed else "–",
            _number(variant["speedup"], "{:.2f}×"),
            _number(peak and peak / 1e9, "{:.2f}"),
            " / ".join(starts),
            _number(variant["loss"], "{:.4f}"),
            _number(variant["largest_deviation"], "{:.4f}"),
        )


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else style.format(value)


def _basis(run: dict[str, Any]) -> str:
    """What a reader of the table must know."""
    losses, variants = run["reference_losses"], run["variants"]
    sentences = list(run["notes"])
    if run["baseline"]:
        sentences.append(f"Speed-up over {variants[run['baseline']]['label']}")
    if run["noise"] is not None:
        sentences.append(
            f"fastgpt measured twice: {100 * run['noise']:.1f}% apart; a smaller difference is none"
        )
    if losses:
        sentences.append(
            f"Loss after {len(losses)} steps, float32 has {losses[-1]:.4f}; off fp32 is the "
            "largest distance on the way"
        )
    else:
        sentences.append(f"Loss after {run['options']['loss_steps']} steps")
    if run["sdpa"]:
        sentences.append(f"SDPA took `{run['sdpa']['operator']}`")
    before, after = run["ceilings"]["before"], run["ceilings"]["after"]
    sentences.append(
        f"The machine's own ceilings before and after: {before['matmul_tflops']:.0f} and "
        f"{after['matmul_tflops']:.0f} TFLOP/s, {before['copy_tb_per_s']:.2f} and "
        f"{after['copy_tb_per_s']:.2f} TB/s"
    )
    return ". ".join(sentences) + "."


def _parts(readme: str) -> tuple[str, str, str]:
    """What is before, between and behind the markers, which belong to the outer two."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.find(BEGIN) > readme.find(END):
        raise ValueError(f"README must have one line {BEGIN!r} and, behind it, one {END!r}")
    before, rest = readme.split(BEGIN)
    between, behind = rest.split(END)
    return f"{before}{BEGIN}\n", between.removeprefix("\n"), f"{END}{behind}"


# --------------------------------------------------------------------------------------- publish


def stale(folder: Path, readme: Path) -> list[str]:
    """What does not show what ``folder`` holds, each in a line."""
    found = read(folder)
    _, between, _ = _parts(readme.read_text())
    out = []
    if between != text(found, readme.parent):
        out.append(f"{readme} differs from {folder}")
    for results in found:
        for name in _PICTURES:
            path = results.folder / name
            if not path.exists():
                out.append(f"{path} is missing")
            elif not _shows(path, results):
                out.append(f"{path} was made from other results")
    return out


def _shows(picture: Path, results: Results) -> bool:
    with Image.open(picture) as image:
        found: object = image.info.get(pictures.DIGEST)
    return found == pictures.signature(picture, results.digest)


def publish(folder: Path, readme: Path) -> list[Path]:
    """Write what is stale; the files."""
    found = read(folder)
    before, between, behind = _parts(readme.read_text())
    written = []
    for results in found:
        for name, draw in _PICTURES.items():
            path = results.folder / name
            if not path.exists() or not _shows(path, results):
                draw(results.runs, path, results.digest)
                written.append(path)
    wanted = text(found, readme.parent)
    if between != wanted:
        partial = readme.with_name(readme.name + ".partial")
        partial.write_text(before + wanted + behind)
        partial.replace(readme)
        written.append(readme)
    return written


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 1 where --check finds a difference, 2 where results cannot be published."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    try:
        o = cli.tyro().cli(Options, args=argv)
        if o.check:
            lines = stale(RESULTS, README)
            code = int(bool(lines))
        else:
            lines = [f"wrote {path}" for path in publish(RESULTS, README)]
            code = 0
    except (ValueError, ModuleNotFoundError) as error:
        return cli.failed(error)
    for line in lines or ["everything is up to date"]:
        console.print(line)
    return code


if __name__ == "__main__":
    sys.exit(main())
