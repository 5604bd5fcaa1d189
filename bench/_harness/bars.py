"""Stacked bar charts of times by kind of work."""

from collections.abc import Mapping
from pathlib import Path

# In the order of the kinds.
_COLOURS = (
    *("#33415c", "#c2571a", "#a4133c", "#6a994e"),
    *("#5c7fa8", "#e0a458", "#9d8189", "#c9ccd3"),
)


def stacked_bars(
    times: Mapping[str, Mapping[str, float]], title: str, xlabel: str, path: Path
) -> None:
    """Write a PNG with one bar per label of ``times``, stacked from its milliseconds by kind. All
    labels have the same kinds; the totals are compared with the last one's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 2.4 + 0.55 * len(times)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(times)
    for name, colour in zip(next(iter(times.values())), _COLOURS, strict=False):
        widths = [of_label[name] for of_label in times.values()]
        axes.barh(range(len(times)), widths, left=left, color=colour, label=name, height=0.65)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, ms in enumerate(left):
        compared = row < len(left) - 1 and left[-1] > 0
        text = f"{ms:.1f} ms" + (f"  {ms / left[-1]:.2f}x" if compared else "")
        axes.annotate(text, (ms, row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.axvline(left[-1], color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(times)), list(times))
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(xlabel)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
