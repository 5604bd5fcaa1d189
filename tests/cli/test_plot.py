"""``fastgpt plot``: points drawn, output path, rejected input."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastgpt.__main__ import main
from fastgpt.cli.plot import PlotConfig, draw, plot

matplotlib = pytest.importorskip("matplotlib", reason="needs the extra log")


def rows(offset: float = 0.0) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(0, 50, 5):
        if i % 10 == 0:
            loss = offset + 3.0 - i / 50
            found.append({"iter": i, "train/loss": loss, "val/loss": loss + 0.1, "lr": 1e-3})
        figures = {"loss": offset + 3.0 - i / 50, "lr": 1e-3, "tokens_per_second": 1e5 + i}
        found.append({"iter": i, **figures})
    return found


def written(folder: Path, found: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def lines(figure: Any, panel: int) -> list[dict[int, float]]:
    return [
        dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in figure.axes[panel].get_lines()
    ]


def test_the_curves_are_those_of_the_log() -> None:
    runs = {"a": rows(), "b": rows(offset=1.0)}
    figure = draw(runs)
    expected = [
        [
            {row["iter"]: row[key] for row in found if key in row}
            for found in runs.values()
            for key in keys
        ]
        for keys in (("loss", "train/loss"), ("val/loss",), ("lr",), ("tokens_per_second",))
    ]
    assert [lines(figure, panel) for panel in range(4)] == expected
    colours = [line.get_color() for line in figure.axes[0].get_lines()]
    assert colours == ["C0", "C0", "C1", "C1"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "a: best validation loss 2.3000 at iteration 40",
        "b: best validation loss 3.3000 at iteration 40",
    ]


@pytest.mark.parametrize(
    "figures, evaluated",
    [
        ({"pair_loss": 0.7}, {"val/pair_loss": 0.6, "val/accuracy": 0.5, "val/margin": 0.1}),
        ({"reward": 0.2, "kl": 0.1, "length": 3.0}, {"val/reward": 0.4, "val/match": 0.5}),
    ],
    ids=["reward", "rl"],
)
def test_the_curves_of_an_assistants_runs(
    figures: dict[str, float], evaluated: dict[str, float]
) -> None:
    found = [{"iter": 1, **evaluated}, {"iter": 1, **figures, "lr": 1e-3}]
    panels = [lines(draw({"a": found}), panel) for panel in range(4)]
    first, over = panels[0]
    drawn = [first, over, *(line for panel in panels[1:] for line in panel)]
    expected = {**figures, **evaluated}
    if "pair_loss" in figures:
        expected["lr"] = 1e-3
    assert sorted(y for line in drawn for y in line.values()) == sorted(expected.values())


def test_gaps_and_labels() -> None:
    """A non-finite value, a run without an evaluation, a label that matplotlib would hide."""
    gap = {"iter": 50, "val/loss": None, "train/loss": None, "lr": 0.0}
    without = [row for row in rows() if "loss" in row]
    figure = draw({"a": [*rows(), gap], "b": without, "_c": rows()})
    assert math.isnan(lines(figure, 1)[0][50]) and lines(figure, 1)[1] == {}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a: best validation loss 2.3000 at iteration 40",
        "b",
        "./_c: best validation loss 2.3000 at iteration 40",
    ]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out", "other"):
        written(Path(name), rows())
    assert main(["plot"]) == 0
    assert capsys.readouterr().out == "wrote out/curves.png\n"
    pixels = matplotlib.image.imread("out/curves.png")
    assert pixels.shape == (1050, 1650, 4) and pixels[:, :, :3].std() > 0.05
    Path("curves.png").write_text("an old picture")
    assert main(["plot", "out", "other"]) == 0
    assert capsys.readouterr().out == "wrote curves.png\n"
    assert main(["plot", "out", "other", "--output=new/both.png"]) == 0
    assert capsys.readouterr().out == "wrote new/both.png\n" and Path("new/both.png").is_file()
    assert main(["plot", "absent"]) == 2
    assert "there is no absent/log.jsonl: `fastgpt train`" in capsys.readouterr().err


def test_what_is_refused(tmp_path: Path) -> None:
    empty = written(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="log.jsonl is empty"):
        plot(PlotConfig(folders=(empty,)))
    folder = written(tmp_path / "out", rows())
    with pytest.raises(ValueError, match="output must end in .png, got .*train.py"):
        plot(PlotConfig(folders=(folder,), output=tmp_path / "train.py"))
    with pytest.raises(ValueError, match="folders must name at least one run"):
        plot(PlotConfig(folders=()))
