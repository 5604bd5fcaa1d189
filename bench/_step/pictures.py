"""Charts of runs on one machine: speed and loss, with a row of axes per run."""

import textwrap
from pathlib import Path
from typing import Any

from bench._harness import machine
from bench._step import report

_OURS, _OTHERS = "#c2571a", "#8a94a6"
# Colours of the variants' curves, in order.
_COLOURS = (
    *("#8a94a6", "#33415c", "#5c7fa8", "#6a994e", "#c2571a", "#e0a458"),
    *("#a4133c", "#9d8189", "#2a9d8f", "#7b2cbf", "#e76f9b", "#7f5539"),
)


def speed(runs: list[dict[str, Any]], path: Path) -> None:
    """Tokens per second as bars with whiskers from p10 to p90."""
    figure, all_axes = _figure(runs, 1, "tokens per second, median and p10-p90, speed-up")
    for run, (axes,) in zip(runs, all_axes, strict=True):
        variants = run["variants"]
        axes.set_yticks(range(len(variants)), [one["label"] for one in variants.values()])
        for row, (name, variant) in enumerate(variants.items()):
            speed = variant["tokens_per_s"]
            if speed is None:
                end, text = 0.0, variant["failure"] or "not measured"
            else:
                middle, low, end = speed["median"], speed["p10"], speed["p90"]
                colour = _OURS if name.startswith("fastgpt") else _OTHERS
                whisker = [[middle - low], [end - middle]]
                axes.barh(row, middle, color=colour, height=0.65, xerr=whisker, capsize=3)
                over = variant["speedup"]
                text = f"{middle:,.0f}" + (f"  {over:.2f}x" if over else "")
            axes.annotate(text, (end, row), xytext=(8, 0), textcoords="offset points", va="center")
        axes.set_ylim(len(variants) - 0.5, -0.5)  # the first on top; failed ones have no bar
        axes.margins(x=0.2)
        axes.set_xlim(left=0.0)
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(
            "\n".join(line for one in report.caveats(run) for line in textwrap.wrap(one))
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def loss(runs: list[dict[str, Any]], path: Path) -> None:
    """The losses, and their differences from the float32 reference's losses or, without a
    reference, from those of a variant that does not use this library's ops."""
    figure, rows = _figure(runs, 2, "loss")
    handles: dict[str, Any] = {}
    names = list(dict.fromkeys(name for run in runs for name in run["variants"]))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    for run, (left, right) in zip(runs, rows, strict=True):
        reference = run["reference_losses"]
        if reference:
            style: dict[str, Any] = {"color": "black", "linewidth": 2.5}
            left.plot(range(1, len(reference) + 1), reference, label="float32 reference", **style)
        subtracted, of = reference, "the float32 reference"
        for name in ("sdpa_compile", "sdpa", "naive"):  # the last that was measured
            if not reference and name in run["variants"] and run["variants"][name]["losses"]:
                subtracted, of = run["variants"][name]["losses"], run["variants"][name]["label"]
        right.axhline(0.0, color="black", linewidth=0.8)
        if subtracted:
            right.set_title(f"difference from {of}", fontsize=10)
        for name, variant in run["variants"].items():
            style = {
                "color": colours[name],
                "linewidth": 1.6 if name.startswith("fastgpt") else 1.0,
                "linestyle": ":" if name.endswith("_again") else "-",
            }
            losses = variant["losses"]
            steps = range(1, len(losses) + 1)
            if losses:
                left.plot(steps, losses, label=variant["label"], **style)
            if losses and subtracted:
                right.plot(steps, [a - b for a, b in zip(losses, subtracted, strict=True)], **style)
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.spines[["top", "right"]].set_visible(False)
        curves, labels = left.get_legend_handles_labels()
        handles |= dict(zip(labels, curves, strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=150)


PICTURES = {"speed": speed, "loss": loss}


def _figure(runs: list[dict[str, Any]], columns: int, heading: str) -> tuple[Any, Any]:
    """A figure and its axes by run and column. The title of a run's first axes holds its batch size
    and commit."""
    from matplotlib.figure import Figure

    height = sum(1.0 + 0.4 * len(run["variants"]) for run in runs)
    figure = Figure(figsize=(9.0, 1.2 + height), layout="constrained")
    rows = figure.subplots(len(runs), columns, squeeze=False)
    for run, row in zip(runs, rows, strict=True):
        o = run["options"]
        commit = run["machine"]["commit"]
        of = f", commit {commit[:7]}" if commit else ""
        title = f"B={o['batch_size']}, T={o['block_size']}{of}"
        row[0].set_title(title, loc="left", fontsize=10)
    found = runs[0]["machine"]
    claim = f"{report.CPU_NOTE}: " if found["device"] == "cpu" else ""
    figure.suptitle(f"{claim}{machine.name(found)}\n{heading}")
    return figure, rows
