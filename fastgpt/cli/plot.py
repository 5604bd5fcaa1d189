"""``fastgpt plot``: learning curves of one or more runs, from their ``log.jsonl``."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt._files import check_folder
from fastgpt._optional import optional
from fastgpt.training import log

_CURVES = "curves.png"
# log key → title and unit of its panel, for each kind of run; the first key identifies the kind
LOSSES = {
    "loss": "training loss (nats per token; dots: evaluated)",
    "val/loss": "validation loss (nats per token)",
}
_PANELS = {
    **LOSSES,
    "lr": "learning rate",
    "tokens_per_second": "tokens per second",
}
_REWARD_PANELS = {
    "pair_loss": "training loss (nats per pair; dots: held out)",
    "val/accuracy": "held-out pairs rated in the right order",
    "val/margin": "held-out margin (chosen - rejected)",
    "lr": "learning rate",
}
_RL_PANELS = {
    "reward": "mean reward (dots: held out, likeliest tokens)",
    "kl": "divergence from the start (nats per token)",
    "length": "tokens of an answer",
    "val/match": "held-out answers that match",
}
# Values of single updates are noisy, so these evaluations are drawn over them.
_OVER = {"loss": "train/loss", "pair_loss": "val/pair_loss", "reward": "val/reward"}


@dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """Draw learning curves as PNG: losses and speed, or the metrics of `reward` and `rl`."""

    # Folders of the runs to compare.
    folders: tuple[Path, ...] = (Path("out"),)
    # PNG file to write.
    output: Path | None = None


def plot(config: PlotConfig) -> Path:
    """Draw the curves, replacing an existing picture. Returns its path.

    Raises FileNotFoundError if a folder has no ``log.jsonl``, ValueError if the log is damaged or
    empty, the errors of ``check_folder`` and ``check_picture``, ImportError without matplotlib.
    """
    if not config.folders:
        raise ValueError("folders must name at least one run, got none")
    one = config.folders[0] if len(config.folders) == 1 else Path()
    output = config.output or one / _CURVES
    for folder in config.folders:
        check_folder(folder, "folders must be those of runs")
    check_picture(output)
    figure = draw({str(folder): _rows(folder) for folder in config.folders})
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    return output


def check_picture(output: Path) -> None:
    """Raise ValueError or NotADirectoryError if a picture cannot be written to ``output``."""
    if output.suffix != ".png":
        raise ValueError(f"output must end in .png, got {output}")
    if output.is_dir():
        raise ValueError(f"output must be a file, but {output} is a folder")
    check_folder(output.parent, "output must lie in a folder")


def draw(runs: dict[str, list[log.Row]], panels: dict[str, str] | None = None) -> Any:
    """Draw ``runs``, name → rows of the log, as a ``matplotlib.figure.Figure``. ``panels``: log
    key → title, two per row; None selects those for the kind of run.
    """
    matplotlib_figure = optional("matplotlib.figure", "plot", "log")
    figure = matplotlib_figure.Figure(figsize=(11, 7), layout="constrained")
    if panels is None:
        found = {key for rows in runs.values() for row in rows for key in row}
        kinds = (kind for kind in (_RL_PANELS, _REWARD_PANELS) if next(iter(kind)) in found)
        panels = next(kinds, _PANELS)
    grid = figure.subplots(len(panels) // 2, 2, sharex=True).flat
    for axes, (key, title) in zip(grid, panels.items(), strict=True):
        for number, (name, rows) in enumerate(runs.items()):
            _draw(axes, rows, key, f"C{number}", _label(name, rows))
        axes.set_title(title)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "tokens_per_second":
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:,.0f}")
    for axes in figure.axes[-2:]:
        axes.set_xlabel("iteration")
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False)
    return figure


def _rows(folder: Path) -> list[log.Row]:
    rows = log.read(folder / log.LOG)
    if not rows:
        raise ValueError(f"{folder / log.LOG} is empty: nothing was reported yet")
    return rows


def _points(rows: list[log.Row], key: str) -> tuple[list[int], list[float]]:
    found = [
        (row["iter"], math.nan if row[key] is None else row[key]) for row in rows if key in row
    ]
    return [x for x, _ in found], [y for _, y in found]


def _draw(axes: Any, rows: list[log.Row], key: str, colour: str, label: str) -> None:
    x, y = _points(rows, key)
    if key.startswith("val/"):
        axes.plot(x, y, color=colour, marker="o", markersize=3, label=label)
        return
    noisy = key in _OVER
    axes.plot(x, y, color=colour, linewidth=1, alpha=0.4 if noisy else 1.0, label=label)
    if noisy:
        axes.plot(*_points(rows, _OVER[key]), color=colour, marker="o", markersize=3)


def _label(name: str, rows: list[log.Row]) -> str:
    name = f"./{name}" if name.startswith("_") else name  # matplotlib hides labels with "_"
    found = [(y, x) for x, y in zip(*_points(rows, "val/loss"), strict=True) if math.isfinite(y)]
    if not found:
        return name
    best, iteration = min(found)
    return f"{name}: best validation loss {best:.4f} at iteration {iteration}"
