"""The runs on one GPU as pictures: speed, loss and memory, a row of axes for each batch size."""

from pathlib import Path
from typing import Any

from bench._harness import machine
from bench._step import report

DIGEST = "results-sha256"  # the name of the text in a PNG that says what it shows

# A colour for each variant's curve, in their order.
_COLOURS = (
    *("#8a94a6", "#33415c", "#5c7fa8", "#6a994e", "#c2571a", "#e0a458"),
    *("#a4133c", "#9d8189", "#2a9d8f", "#7b2cbf", "#e76f9b", "#7f5539"),
)


def speed(runs: list[dict[str, Any]], path: Path, digest: str) -> None:
    """Tokens per second as bars with whiskers from p10 to p90."""
    figure, rows = _figure(runs, 1, "tokens per second, median and p10-p90, speed-up")
    for run, (axes,) in zip(runs, rows, strict=True):
        report.speed_bars(axes, run)
    _save(figure, path, digest)


def memory(runs: list[dict[str, Any]], path: Path, digest: str) -> None:
    """Peak of allocated memory as bars, with the share of the variant that speed-ups refer to."""
    figure, rows = _figure(runs, 1, "peak memory in GB")
    for run, (axes,) in zip(runs, rows, strict=True):
        variants = run["variants"]
        peaks = [(variant["peak_memory_bytes"] or 0) / 1e9 for variant in variants.values()]
        base = variants[run["baseline"]]["peak_memory_bytes"] if run["baseline"] else None
        texts = [
            f"{peak:.2f}" + (f"  {1e9 * peak / base:.2f}x" if base else "") if peak else "–"
            for peak in peaks
        ]
        report.bars(axes, run, peaks, peaks, texts)
    _save(figure, path, digest)


def loss(runs: list[dict[str, Any]], path: Path, digest: str) -> None:
    """The losses, and how far they are from the float32 reference's."""
    figure, rows = _figure(runs, 2, "loss, and loss less that of the float32 reference")
    for run, (left, right) in zip(runs, rows, strict=True):
        reference = run["reference_losses"]
        if reference:
            left.plot(
                range(1, len(reference) + 1),
                reference,
                color="black",
                linewidth=2.5,
                label="float32 reference",
            )
        right.axhline(0.0, color="black", linewidth=0.8)
        for number, (name, variant) in enumerate(run["variants"].items()):
            if not variant["losses"]:
                continue
            again = name.endswith("_again")
            style: dict[str, Any] = {
                "color": _COLOURS[number % len(_COLOURS)],
                "linewidth": 1.6 if name.startswith("fastgpt") else 1.0,
                "linestyle": ":" if again else "-",
            }
            steps = range(1, len(variant["losses"]) + 1)
            left.plot(steps, variant["losses"], label=variant["label"], **style)
            if reference:
                distances = [a - b for a, b in zip(variant["losses"], reference, strict=True)]
                right.plot(steps, distances, **style)
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle
        for axes in (axes for row in rows for axes in row)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False
    )
    _save(figure, path, digest)


def _figure(runs: list[dict[str, Any]], columns: int, title: str) -> tuple[Any, Any]:
    """A figure, and its axes by run and column; those of a run have its batch size as title."""
    from matplotlib.figure import Figure

    height = sum(1.0 + 0.4 * len(run["variants"]) for run in runs)
    figure = Figure(figsize=(9.0, 1.2 + height), layout="constrained")
    rows = figure.subplots(len(runs), columns, squeeze=False)
    for run, row in zip(runs, rows, strict=True):
        o = run["options"]
        row[0].set_title(f"B={o['batch_size']}, T={o['block_size']}", loc="left", fontsize=10)
    figure.suptitle(f"{machine.name(runs[0]['machine'])}: {title}")
    return figure, rows


def signature(path: Path, digest: str) -> str:
    """What a picture carries: which one it is, and of which results."""
    return f"{path.name} {digest}"


def _save(figure: Any, path: Path, digest: str) -> None:
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png", metadata={DIGEST: signature(path, digest)})
    partial.replace(path)
