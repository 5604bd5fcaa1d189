"""A run of ``run.py`` as a record (what its JSON holds), as a table and as a chart. Table and chart
are made from the record alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from bench._harness import machine
from bench._harness.timing import Spread, rate, spread

CPU_NOTE = "CPU, no claim about GPUs"
# the best of them is what a speed-up refers to
_BASELINES = ("sdpa_compile", "sdpa_autotune", "sdpa_graphs")
_OVER_EAGER = ("fastgpt", "sdpa")
_NOISE = ("fastgpt", "fastgpt_again")  # the same thing measured twice
OURS, OTHERS = "#c2571a", "#8a94a6"  # colours


@dataclass
class Result:
    """What was measured of one variant. ``failure`` says why it has no speed."""

    label: str
    failure: str | None = None
    cold_start_s: float | None = None
    warm_start_s: float | None = None
    peak_memory_bytes: int | None = None
    losses: list[float] = field(default_factory=list)
    step_ms: list[list[float]] = field(default_factory=list)  # of each round


@dataclass
class Group:
    """Variants that were measured side by side, among them ``base``, which is in every group."""

    base: str
    variants: list[str]
    base_step_ms: list[list[float]] = field(default_factory=list)  # of each round, in this group


def record(
    results: Mapping[str, Result],
    reference_losses: list[float],
    tokens_per_step: int,
    groups: Sequence[Group] = (),
    reference_failure: str | None = None,
) -> dict[str, Any]:
    """The variants, their speeds and losses, and what they are compared with. Without ``groups``
    all were measured side by side."""
    speeds = {
        name: spread([ms for times in result.step_ms for ms in times])
        for name, result in results.items()
        if result.failure is None and result.step_ms
    }
    rates = {name: rate(ms, tokens_per_step) for name, ms in speeds.items()}
    relative = _relative(speeds, groups)
    measured = [name for name in _BASELINES if name in relative]
    baseline = max(measured, key=lambda name: relative[name], default=None)
    return {
        "tokens_per_step": tokens_per_step,
        "baseline": baseline,
        "over_eager": _ratio(relative, *_OVER_EAGER),
        "noise": _difference(relative),
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
    """How many times as fast each variant is as the base of its group."""
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
    """How many times as fast as ``base``; None unless both were measured."""
    if name not in relative or base not in relative:
        return None
    return relative[name] / relative[base]


def _difference(relative: Mapping[str, float]) -> float | None:
    """By what share two measurements of the same thing differ."""
    ratio = _ratio(relative, *reversed(_NOISE))
    return None if ratio is None else abs(ratio - 1.0)


def _deviation(result: Result, reference_losses: list[float]) -> dict[str, float | None]:
    """The last loss less the reference's, and the largest distance on the way."""
    if not result.losses or not reference_losses:
        loss = result.losses[-1] if result.losses else None
        return {"loss": loss, "loss_deviation": None, "largest_deviation": None}
    deviations = [a - b for a, b in zip(result.losses, reference_losses, strict=True)]
    return {
        "loss": result.losses[-1],
        "loss_deviation": deviations[-1],
        "largest_deviation": max(map(abs, deviations)),
    }


def title(run: dict[str, Any]) -> str:
    """Machine and size in one line; on a CPU it begins with ``CPU_NOTE``."""
    o = run["options"]
    size = (
        f"{run['parameters'] / 1e6:.1f}M parameters, B={o['batch_size']}, T={o['block_size']}, "
        f"{run['dtype']}"
    )
    claim = f"{CPU_NOTE}: " if run["machine"]["device"] == "cpu" else ""
    return f"{claim}{machine.name(run['machine'])}, {size}"


def table(run: dict[str, Any]) -> Table:
    """One row a variant. It fits 80 columns."""
    out = Table(
        title=title(run),
        caption=_caption(run),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        pad_edge=False,
    )
    out.add_column("variant\n", no_wrap=True)
    for header in (
        "tokens\n/s",
        "speed\n-up",
        "ms\n/step",
        "p10\n-p90",
        "peak\nGB",
        "1st step s\ncold/warm",
        "loss\n",
        "off\nfp32",
    ):
        out.add_column(header, justify="right", no_wrap=True)
    for name, variant in run["variants"].items():
        out.add_row(name, *_cells(variant))
    return out


def _cells(variant: dict[str, Any]) -> list[str]:
    ms, peak = variant["ms_per_step"], variant["peak_memory_bytes"]
    median = None if ms is None else variant["tokens_per_s"]["median"]
    starts = [_three_digits(variant[key]) for key in ("cold_start_s", "warm_start_s")]
    return [
        _number(median, "{:,.0f}"),
        _number(variant["speedup"], "{:.2f}x"),
        "–" if ms is None else _four_digits(ms["median"]),
        "–" if ms is None else f"{_three_digits(ms['p10'])}-{_three_digits(ms['p90'])}",
        _number(None if peak is None else peak / 1e9, "{:.2f}"),
        "/".join(starts),
        _number(variant["loss"], "{:.4f}"),
        _number(variant["largest_deviation"], "{:.0e}"),
    ]


def _number(value: float | None, style: str) -> str:
    return "–" if value is None else style.format(value)


def _four_digits(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _three_digits(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _basis(run: dict[str, Any]) -> list[str]:
    """What a reader of the speeds must know."""
    lines = list(run["notes"])
    if not run["complete"]:
        lines.append("not complete: the run was cut off")
    if run["reference_failure"] is not None:
        lines.append(f"no float32 losses: {run['reference_failure']}")
    if len(run["groups"]) > 1:
        base = run["groups"][0]["base"]
        lines.append(f"in {len(run['groups'])} groups that fit into memory, {base} in each")
    if run["baseline"] is not None:
        lines.append(f"speed-up: over {run['baseline']}")
    if run["over_eager"] is not None:
        fast, eager = _OVER_EAGER
        lines.append(f"{fast} over {eager}: {run['over_eager']:.2f}x")
    if run["noise"] is not None:
        lines.append(
            f"fastgpt measured twice: {100 * run['noise']:.1f}% apart; a smaller difference is none"
        )
    return lines


def _caption(run: dict[str, Any]) -> str:
    failures = [
        f"{name}: {variant['failure']}"
        for name, variant in run["variants"].items()
        if variant["failure"] is not None
    ]
    return "\n".join(["", *_basis(run), *_loss_notes(run), *failures])


def _loss_notes(run: dict[str, Any]) -> list[str]:
    losses = run["reference_losses"]
    if not losses:
        return [f"loss: after {run['options']['loss_steps']} steps"]
    return [
        f"loss: after {len(losses)} steps, where float32 has {losses[-1]:.4f}",
        "off fp32: the largest distance from the float32 losses on the way",
    ]


def chart(run: dict[str, Any], path: Path) -> None:
    """Tokens per second as bars with whiskers from p10 to p90, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.6 + 0.5 * len(run["variants"])), layout="constrained")
    axes = figure.subplots()
    speed_bars(axes, run)
    axes.set_xlabel("\n".join(["tokens per second (median, p10-p90)", *_basis(run)]))
    figure.suptitle(title(run))
    figure.savefig(path, dpi=150)


def speed_bars(axes: Any, run: dict[str, Any]) -> None:
    """A bar with whiskers for each variant."""
    variants = list(run["variants"].values())
    none = {"median": 0.0, "p10": 0.0, "p90": 0.0}
    speeds = [variant["tokens_per_s"] or none for variant in variants]
    medians = [speed["median"] for speed in speeds]
    whiskers = [
        [speed["median"] - speed["p10"] for speed in speeds],
        [speed["p90"] - speed["median"] for speed in speeds],
    ]
    texts = [
        f"{speed['median']:,.0f}  {_number(variant['speedup'], '{:.2f}x')}"
        if variant["tokens_per_s"]
        else variant["failure"] or "not measured"
        for variant, speed in zip(variants, speeds, strict=True)
    ]
    bars(axes, run, medians, [speed["p90"] for speed in speeds], texts, xerr=whiskers, capsize=3)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def bars(
    axes: Any,
    run: dict[str, Any],
    widths: list[float],
    ends: list[float],
    texts: list[str],
    **options: Any,
) -> None:
    """One below the other, a variant each, with a text behind its end."""
    rows = range(len(widths))
    colours = [OURS if name.startswith("fastgpt") else OTHERS for name in run["variants"]]
    axes.barh(rows, widths, color=colours, height=0.65, **options)
    for row, end, text in zip(rows, ends, texts, strict=True):
        axes.annotate(text, (end, row), xytext=(8, 0), textcoords="offset points", va="center")
    axes.set_yticks(rows, [variant["label"] for variant in run["variants"].values()])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlim(left=0.0)
    axes.locator_params(axis="x", nbins=6)
    axes.spines[["top", "right"]].set_visible(False)
