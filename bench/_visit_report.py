"""A visit of ``gpu_report.py`` as Markdown, made from its record alone."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any


def markdown(record: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    """``runs``: name of the stage → record of ``run.py``."""
    machine = record["machine"] or {}
    stages = {stage["name"]: stage for stage in record["stages"]}
    sections = [
        f"# {machine.get('gpu', 'GPU')}: {record['created']}",
        _facts(record),
        "## Stages\n\n" + _table(("stage", "status", "s", ""), _stage_rows(record["stages"])),
    ]
    for name, title, section in (
        ("parity", "Native parity", _parity),
        ("ops", "Ops", _ops),
        ("profile", "Where the time of a step goes", _profile),
        ("sweep", "Launch tables", _sweep),
        ("determinism", "Determinism", _determinism),
        ("memcheck", "compute-sanitizer memcheck", _sanitizer),
        ("racecheck", "compute-sanitizer racecheck", _sanitizer),
    ):
        data = stages.get(name, {}).get("data")
        if name == "profile":
            sections += [f"## {run}\n\n{_run(found)}" for run, found in runs.items()]
        if data:
            sections.append(f"## {title}\n\n{section(data)}")
    for stage in record["stages"]:
        if stage.get("output"):
            sections.append(f"## Output of {stage['name']}\n\n" + _block(stage["output"]))
    return "\n\n".join(sections) + "\n"


def _facts(record: dict[str, Any]) -> str:
    machine = record["machine"]
    if machine is None:
        return "The machine was not read."
    commit = machine["commit"] or "unknown"
    changed = ", with uncommitted changes" if machine["uncommitted_changes"] else ""
    lines = [
        f"- commit {commit}{changed}",
        f"- torch {machine['torch']}, triton {machine['triton']}, CUDA {machine['cuda']}, "
        f"cuDNN {machine['cudnn']}, Python {machine['python']}",
    ]
    for when, found in record["ceilings"].items():
        if found is not None:
            lines.append(
                f"- ceilings {when}: {found['matmul_tflops']:.0f} TFLOP/s ({found['matmul']}), "
                f"{found['copy_tb_per_s']:.2f} TB/s ({found['copy']})"
            )
    return "\n".join(lines)


def _stage_rows(stages: Iterable[dict[str, Any]]) -> Iterator[Sequence[str]]:
    for stage in stages:
        yield stage["name"], stage["status"], f"{stage.get('seconds', '')}", stage["why"] or ""


def _parity(data: dict[str, Any]) -> str:
    outcomes = ("passed", "failed", "skipped")
    rows = [
        (kind, *(str(count.get(outcome, 0)) for outcome in outcomes))
        for kind, count in data["counts"].items()
    ]
    rows.append(("all", *(str(data[outcome]) for outcome in outcomes)))
    text = _table(("tests", *outcomes), rows)
    failures = [(f["test"], f["message"]) for f in data["failures"]]
    if failures:
        text += "\n\n" + _table(("failed", "why"), failures)
    if data["not_ended"]:
        text += "\n\nBegun and not ended: " + ", ".join(data["not_ended"])
    return text


def _ops(data: dict[str, Any]) -> str:
    headers = ("op", "shape", "direction", "provider", "ms", "GB/s", "TFLOP/s", "of ceiling")
    rows = [
        (
            row["op"],
            row["shape"],
            row["direction"],
            row["provider"],
            f"{row['ms']:.4g}",
            f"{row['gb_per_s']:.0f}",
            _number(row["tflop_per_s"], ".0f"),
            _number(row["share_of_ceiling"], ".0%"),
        )
        for row in sorted(
            data["rows"], key=lambda row: (row["op"], row["shape"], row["direction"], row["ms"])
        )
    ]
    text = _table(headers, rows)
    failures = [(failure["test"], failure["message"]) for failure in data["failures"]]
    return text + ("\n\n" + _table(("failed", "why"), failures) if failures else "")


def _run(run: dict[str, Any]) -> str:
    headers = ("variant", "tokens/s", "speed-up", "ms/step", "peak GB", "loss", "off fp32", "")
    rows = []
    for name, variant in run["variants"].items():
        ms, speed = variant["ms_per_step"], variant["tokens_per_s"]
        peak = variant["peak_memory_bytes"]
        rows.append(
            (
                name,
                "-" if speed is None else f"{speed['median']:,.0f}",
                _number(variant["speedup"], ".2f"),
                "-" if ms is None else f"{ms['median']:.2f}",
                "-" if peak is None else f"{peak / 1e9:.2f}",
                _number(variant["loss"], ".4f"),
                _number(variant["largest_deviation"], ".4f"),
                variant["failure"] or "",
            )
        )
    o = run["options"]
    against = " against float32" if run["reference_losses"] else ""
    notes = [
        f"B={o['batch_size']}, T={o['block_size']}, {run['dtype']}; {o['loss_steps']} losses"
        f"{against}; speed-up over {run['baseline']}; noise {_number(run['noise'], '.1%')}",
        *run["notes"],
        *([] if run["complete"] else ["not complete: the run was cut off"]),
    ]
    return _table(headers, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


def _profile(data: dict[str, Any]) -> str:
    size = f"B={data['batch_size']}, T={data['block_size']}"
    return "\n\n".join(
        f"### {name}, {size}\n\n{_profile_of(one)}" for name, one in data["variants"].items()
    )


def _profile_of(data: dict[str, Any]) -> str:
    if "failure" in data:
        return str(data["failure"])
    rows = [
        (
            row["kind"],
            f"{row['ms']:.2f}",
            f"{row['share']:.0%}",
            _number(row["floor_ms"], ".2f"),
            _number(row["ratio"], ".2f"),
        )
        for row in data["kinds"]
    ]
    rows.append(
        (
            "all kernels",
            f"{data['kernels_ms']:.2f}",
            "100%",
            f"{data['floor_ms']:.2f}",
            _number(data["kernels_ms"] / data["floor_ms"], ".2f"),
        )
    )
    kernels = [
        (f"`{kernel['name'][:70]}`", f"{kernel['calls']:g}", f"{kernel['ms']:.3f}",
         f"{kernel['share']:.1%}")
        for kernel in data["kernels"]
    ]  # fmt: skip
    return (
        f"{data['step_ms']:.2f} ms a step, "
        f"no kernel running in {max(data['step_ms'] - data['kernels_ms'], 0):.2f} of them.\n\n"
        + _table(("kind", "ms", "share", "floor ms", "times the floor"), rows)
        + "\n\n"
        + _table(("kernel", "calls", "ms", "share"), kernels)
    )


def _sweep(data: Sequence[dict[str, Any]]) -> str:
    lines: list[str] = []
    for one in data:
        if one["measured"] is not None:
            lines += [*one["comment"].splitlines(), one["measured"]["line"], ""]
    return _block(lines, "python")


def _determinism(data: dict[str, Any]) -> str:
    rows = [(op, str(one["repeats"]), str(one["different"])) for op, one in data.items()]
    return _table(("op, forward and backward", "times", "not equal to the first"), rows)


def _sanitizer(data: dict[str, Any]) -> str:
    summary = f"{data['summary'] or 'no summary'}; ops: {', '.join(data['ops'])}"
    return f"{summary}\n\n{_block(data['log'])}"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _block(lines: Iterable[str], language: str = "") -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
