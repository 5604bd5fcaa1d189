"""Reports of ``run.py``: the record, which is the content of the JSON file, and the table (for a
terminal or as Markdown) and notes made from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.table import Table

from bench._harness import machine
from bench._harness.timing import Spread, rate, spread

CPU_NOTE = "CPU, no claim about GPUs"
# Speed-ups are relative to the fastest of these.
_BASELINES = (
    "sdpa_compile",
    "sdpa_flash",
    "sdpa_cudnn",
    "sdpa_chunked",
    "sdpa_graphs",
    "sdpa_autotune",
)
_OVER_EAGER = ("fastgpt", "sdpa")
_NOISE = ("fastgpt", "fastgpt_again")  # the same code measured twice


@dataclass
class Result:
    """The measurements of one variant. ``failure`` says why it has no speed."""

    label: str
    failure: str | None = None
    cold_start_s: float | None = None
    warm_start_s: float | None = None
    peak_memory_bytes: int | None = None
    losses: list[float] = field(default_factory=list)
    step_ms: list[list[float]] = field(default_factory=list)  # per round


@dataclass
class Group:
    """Variants measured side by side, including ``base``, which is in every group."""

    base: str
    variants: list[str]
    base_step_ms: list[list[float]] = field(default_factory=list)  # per round, in this group


# ------------------------------------------------------------------------------------- the record


def record(
    results: Mapping[str, Result],
    reference_losses: list[float],
    tokens_per_step: int,
    groups: Sequence[Group] = (),
    reference_failure: str | None = None,
) -> dict[str, Any]:
    """The variants with their speeds and losses, and the baselines. Without ``groups``, all were
    measured side by side."""
    speeds = {
        name: spread([ms for times in result.step_ms for ms in times])
        for name, result in results.items()
        if result.failure is None and result.step_ms
    }
    rates = {name: rate(ms, tokens_per_step) for name, ms in speeds.items()}
    relative = _relative(speeds, groups)
    measured = [name for name in _BASELINES if name in relative]
    baseline = max(measured, key=lambda name: relative[name], default=None)
    noise = _ratio(relative, *reversed(_NOISE))
    return {
        "tokens_per_step": tokens_per_step,
        "baseline": baseline,
        "over_eager": _ratio(relative, *_OVER_EAGER),
        "noise": None if noise is None else abs(noise - 1.0),
        "groups": [asdict(group) for group in groups],
        "reference_losses": reference_losses,
        "reference_failure": reference_failure,
        "variants": {
            name: {
                **asdict(result),
                "ms_per_step": asdict(speeds[name]) if name in speeds else None,
                "tokens_per_s": asdict(rates[name]) if name in rates else None,
                "speedup": None if baseline is None else _ratio(relative, name, baseline),
                **_deviation(result, reference_losses),
            }
            for name, result in results.items()
        },
    }


def _relative(speeds: Mapping[str, Spread], groups: Sequence[Group]) -> dict[str, float]:
    """Each variant's speed relative to the base of its group."""
    if len(groups) < 2:
        return {name: 1.0 / ms.median for name, ms in speeds.items()}
    out = {}
    for group in groups:
        times = [ms for turn in group.base_step_ms for ms in turn]
        for name in group.variants:
            if times and name in speeds and name not in out:
                out[name] = spread(times).median / speeds[name].median
    return out


def _ratio(relative: Mapping[str, float], name: str, base: str) -> float | None:
    """How many times as fast as ``base`` it is; None unless both were measured."""
    if name not in relative or base not in relative:
        return None
    return relative[name] / relative[base]


def _deviation(result: Result, reference_losses: list[float]) -> dict[str, float | None]:
    """The last loss, and the largest difference from the reference's losses over all steps."""
    loss = result.losses[-1] if result.losses else None
    if loss is None or not reference_losses:
        return {"loss": loss, "largest_deviation": None}
    pairs = zip(result.losses, reference_losses, strict=True)
    return {"loss": loss, "largest_deviation": max(abs(a - b) for a, b in pairs)}


# -------------------------------------------------------------------------------------- the table

# Line breaks as in the terminal's columns.
_HEADERS = (
    "variant\n",
    "tokens\n/s",
    "speed\n-up",
    "ms\n/step",
    "p10\n-p90",
    "peak\nGB",
    "1st step s\ncold/warm",
    "loss\n",
    "off\nfp32",
)


def title(run: dict[str, Any]) -> str:
    """Machine and size in one line, starting with ``CPU_NOTE`` on a CPU."""
    o = run["options"]
    claim = f"{CPU_NOTE}: " if run["machine"]["device"] == "cpu" else ""
    return (
        f"{claim}{machine.name(run['machine'])}, {run['parameters'] / 1e6:.1f}M parameters, "
        f"B={o['batch_size']}, T={o['block_size']}, {run['dtype']}"
    )


def table(run: dict[str, Any]) -> Table:
    """The table for a terminal; it fits in 80 columns."""
    out = Table(
        title=title(run),
        caption="\n".join(["", *notes(run)]),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    for header in _HEADERS:
        left = header.startswith("variant")
        out.add_column(header, justify="left" if left else "right", no_wrap=True)
    for name, variant in run["variants"].items():
        out.add_row(name, *_cells(variant))
    return out


def markdown(run: dict[str, Any], columns: Sequence[int] = range(len(_HEADERS))) -> list[str]:
    """The table, or some columns of it, as lines of Markdown."""
    titles = [" ".join(title.split()).replace(" /", "/").replace(" -", "-") for title in _HEADERS]
    rows = [titles, *([one["label"], *_cells(one)] for one in run["variants"].values())]
    lines = [f"| {' | '.join(row[column] for column in columns)} |" for row in rows]
    return [lines[0], "|---" + "|--:" * (len(columns) - 1) + "|", *lines[1:]]


def _cells(variant: dict[str, Any]) -> list[str]:
    ms, peak = variant["ms_per_step"], variant["peak_memory_bytes"]
    first_step = [_three_digits(variant[key]) for key in ("cold_start_s", "warm_start_s")]
    return [
        _number(ms and variant["tokens_per_s"]["median"], "{:,.0f}"),
        _number(variant["speedup"], "{:.2f}x"),
        _three_digits(ms and ms["median"]),
        f"{_three_digits(ms['p10'])}-{_three_digits(ms['p90'])}" if ms else "–",
        _number(peak and peak / 1e9, "{:.2f}"),
        "/".join(first_step),
        _number(variant["loss"], "{:.4f}"),
        _number(variant["largest_deviation"], "{:.0e}"),
    ]


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else style.format(value)


def _three_digits(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def caveats(run: dict[str, Any]) -> list[str]:
    """How the run deviates from the protocol of ``run.py``."""
    return [*run["notes"], *([] if run["complete"] else ["Not complete: the run was cut off"])]


def notes(run: dict[str, Any]) -> list[str]:
    """Notes for readers of the table, one sentence each, without the full stop."""
    lines = caveats(run)
    losses, variants = run["reference_losses"], run["variants"]
    if len(run["groups"]) > 1:
        base = variants[run["groups"][0]["base"]]["label"]
        lines.append(f"In {len(run['groups'])} groups that fit into memory, {base} in each")
    if run["baseline"] is not None:
        lines.append(f"Speed-up: over {variants[run['baseline']]['label']}")
    if run["over_eager"] is not None:
        fast, eager = (variants[name]["label"] for name in _OVER_EAGER)
        lines.append(f"{fast} over {eager}: {run['over_eager']:.2f}x")
    if run["noise"] is not None:
        noise = f"{100 * run['noise']:.1f}%"
        lines.append(f"fastgpt measured twice: {noise} apart; smaller differences mean nothing")
    if losses:
        lines.append(
            f"Loss: after {len(losses)} steps, where float32 has {losses[-1]:.4f}; off fp32: the "
            "largest distance from it at any step"
        )
    else:
        lines.append(f"Loss: after {run['options']['loss_steps']} steps")
    if run["reference_failure"] is not None:
        lines.append(f"No float32 losses: {run['reference_failure']}")
    lines += [f"{v['label']}: {v['failure']}" for v in variants.values() if v["failure"]]
    return lines
