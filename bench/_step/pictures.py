"""Runs on one machine as pictures: speed, loss and memory, a row of axes for each run."""

from pathlib import Path
from typing import Any

from bench._harness import machine
from bench._step import report

_OURS, _OTHERS = "#c2571a", "#8a94a6"
# A colour for each variant's curve, in their order.
_COLOURS = (
    *("#8a94a6", "#33415c", "#5c7fa8", "#6a994e", "#c2571a", "#e0a458"),
    *("#a4133c", "#9d8189", "#2a9d8f", "#7b2cbf", "#e76f9b", "#7f5539"),
)


def speed(runs: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second as bars with whiskers from p10 to p90."""
    figure, rows = _figure(runs, 1, "tokens per second, median and p10-p90, speed-up")
    for run, (axes,) in zip(runs, rows, strict=True):
        none = {"median": 0.0, "p10": 0.0, "p90": 0.0}
        speeds = [variant["tokens_per_s"] or none for variant in run["variants"].values()]
        whiskers = [
            [speed["median"] - speed["p10"] for speed in speeds],
            [speed["p90"] - speed["median"] for speed in speeds],
        ]
        texts = []
        for variant, speed in zip(run["variants"].values(), speeds, strict=True):
            over = variant["speedup"] and f"  {variant['speedup']:.2f}x"
            measured = f"{speed['median']:,.0f}{over or ''}" if speed is not none else None
            texts.append(measured or variant["failure"] or "not measured")
        ends = [speed["p90"] for speed in speeds]
        medians = [speed["median"] for speed in speeds]
        _bars(axes, run, medians, ends, texts, xerr=whiskers, capsize=3)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("\n".join(report.caveats(run)))
    figure.savefig(path, dpi=150)


def memory(runs: list[dict[str, Any]], path: Path) -> None:
    """Peak of allocated memory as bars, and relative to the variant that speed-ups refer to."""
    figure, rows = _figure(runs, 1, "peak memory in GB")
    for run, (axes,) in zip(runs, rows, strict=True):
        variants = run["variants"]
        peaks = [(variant["peak_memory_bytes"] or 0) / 1e9 for variant in variants.values()]
        base = variants[run["baseline"]]["peak_memory_bytes"] if run["baseline"] else None
        texts = [
            f"{peak:.2f}" + (f"  {1e9 * peak / base:.2f}x" if base else "") if peak else "–"
            for peak in peaks
        ]
        _bars(axes, run, peaks, peaks, texts)
    figure.savefig(path, dpi=150)


def loss(runs: list[dict[str, Any]], path: Path) -> None:
    """The losses, and their distance from the float32 reference's."""
    figure, rows = _figure(runs, 2, "loss, and loss less that of the float32 reference")
    handles: dict[str, Any] = {}
    for run, (left, right) in zip(runs, rows, strict=True):
        reference = run["reference_losses"]
        if reference:
            style: dict[str, Any] = {"color": "black", "linewidth": 2.5}
            left.plot(range(1, len(reference) + 1), reference, label="float32 reference", **style)
        right.axhline(0.0, color="black", linewidth=0.8)
        for number, (name, variant) in enumerate(run["variants"].items()):
            style = {
                "color": _COLOURS[number % len(_COLOURS)],
                "linewidth": 1.6 if name.startswith("fastgpt") else 1.0,
                "linestyle": ":" if name.endswith("_again") else "-",
            }
            losses = variant["losses"]
            steps = range(1, len(losses) + 1)
            if losses:
                left.plot(steps, losses, label=variant["label"], **style)
            if losses and reference:
                right.plot(steps, [a - b for a, b in zip(losses, reference, strict=True)], **style)
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.spines[["top", "right"]].set_visible(False)
        curves, labels = left.get_legend_handles_labels()
        handles |= dict(zip(labels, curves, strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=150)


PICTURES = {"speed": speed, "loss": loss, "memory": memory}


def _figure(runs: list[dict[str, Any]], columns: int, title: str) -> tuple[Any, Any]:
    """A figure, and its axes by run and column; those of a run have its batch size as title."""
    from matplotlib.figure import Figure

    height = sum(1.0 + 0.4 * len(run["variants"]) for run in runs)
    figure = Figure(figsize=(9.0, 1.2 + height), layout="constrained")
    rows = figure.subplots(len(runs), columns, squeeze=False)
    for run, row in zip(runs, rows, strict=True):
        o = run["options"]
        row[0].set_title(f"B={o['batch_size']}, T={o['block_size']}", loc="left", fontsize=10)
    found = runs[0]["machine"]
    claim = f"{report.CPU_NOTE}: " if found["device"] == "cpu" else ""
    figure.suptitle(f"{claim}{machine.name(found)}\n{title}")
    return figure, rows


def _bars(
    axes: Any,
    run: dict[str, Any],
    widths: list[float],
    ends: list[float],
    texts: list[str],
    **options: Any,
) -> None:
    """One below the other, a variant each, with a text behind its end."""
    rows = range(len(widths))
    colours = [_OURS if name.startswith("fastgpt") else _OTHERS for name in run["variants"]]
    axes.barh(rows, widths, color=colours, height=0.65, **options)
    for row, end, text in zip(rows, ends, texts, strict=True):
        axes.annotate(text, (end, row), xytext=(8, 0), textcoords="offset points", va="center")
    axes.set_yticks(rows, [variant["label"] for variant in run["variants"].values()])
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlim(left=0.0)
    axes.locator_params(axis="x", nbins=6)
    axes.spines[["top", "right"]].set_visible(False)
