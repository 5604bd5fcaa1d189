"""bench/publish.py: README and plots against bench/results, and the output for made-up runs."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bench import publish
from bench._step import pictures, report, variants
from bench._step.report import Result

LABELS = {name: variant.label for name, variant in variants.VARIANTS.items()}
SPEEDS = {  # milliseconds per step and peak memory in bytes; made up
    "naive": (160.0, 60e9),
    "sdpa": (100.0, 40e9),
    "sdpa_compile": (64.0, 30e9),
    "sdpa_autotune": (62.0, 30e9),
    "fastgpt": (48.0, 17e9),
    "fastgpt_recompute": (50.0, 12e9),
    "fastgpt_compile": (49.0, 17e9),
    "fastgpt_again": (48.3, 17e9),
}


def made_up(batch_size: int) -> dict[str, Any]:
    """A record in ``run.py``'s format. The GPU and the figures are TEST DATA, not measurements."""
    reference = [10.8 * math.exp(-step / 40) + 1 for step in range(100)]
    results = {}
    for number, (name, (ms, peak)) in enumerate(SPEEDS.items()):
        if name == "naive" and batch_size > 32:
            results[name] = Result(LABELS[name], "out of memory")
            continue
        off = [1e-3 * (number + 1) * math.sin(step * (number + 2) / 9) for step in range(100)]
        results[name] = Result(
            LABELS[name],
            cold_start_s=10.0 + number,
            warm_start_s=1.0 + number,
            peak_memory_bytes=int(peak * batch_size / 32),
            losses=[a + b for a, b in zip(reference, off, strict=True)],
            step_ms=[[ms * batch_size / 32 * (1 + 0.01 * i) for i in range(20)]] * 5,
        )
    state = {"driver_version": "0.0"}
    ceiling = {"matmul_tflops": 700.0, "copy_tb_per_s": 4.0, "gpu_state": state}
    return {
        "created": "2000-01-01T12:00:00+00:00",
        "complete": True,
        "notes": [],
        "machine": {
            "device": "cuda",
            "gpu": "TEST DATA",
            "cpu": None,
            "torch": "0.1",
            "triton": "0.2",
            "cuda": "0.3",
            "cudnn": None,
            "commit": "0123456789abcdef",
            "uncommitted_changes": False,
        },
        "options": {"batch_size": batch_size, "block_size": 1024, "loss_steps": 100},
        "dtype": "bfloat16",
        "parameters": 124_000_000,
        "data": {"source": "test", "train_tokens": 1},
        "sdpa": {"operator": "aten::test", "kernel": None},
        "ceilings": {"before": ceiling, "after": ceiling},
        **report.record(results, reference, 1024 * batch_size),
    }


def written(root: Path, *runs: dict[str, Any]) -> tuple[Path, Path, Path]:
    """A results folder with these runs, and a README and a page with markers."""
    results, readme = root / "bench" / "results", root / "README.md"
    page = root / "docs" / "speed.md"
    page.parent.mkdir()
    (results / "test-data").mkdir(parents=True)
    for run in runs:
        path = results / "test-data" / f"run-b{run['options']['batch_size']}.json"
        path.write_text(json.dumps(run))
    for path in (readme, page):
        path.write_text(f"# title\n\n{publish.BEGIN}\n{publish.END}\n\nthe end\n")
    return results, readme, page


def test_the_readme_and_the_page_show_the_results() -> None:
    found = publish.read(publish.RESULTS)
    for path, shown in ((publish.README, publish.summary), (publish.PAGE, publish.text)):
        between = f"{publish.BEGIN}\n{shown(found, path.parent)}{publish.END}"
        assert between in path.read_text()


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    results, *texts = written(tmp_path)
    for _ in range(2):
        assert publish.publish(results, *texts) == texts[::-1]
        between = f"{publish.BEGIN}\n{publish.NOTHING}{publish.END}"
        assert all(path.read_text() == f"# title\n\n{between}\n\nthe end\n" for path in texts)


def test_tables(tmp_path: Path) -> None:
    results, readme, page = written(tmp_path, *map(made_up, (64, 4, 32)))
    files = publish.publish(results, readme, page)
    pictures = [results / "test-data" / name for name in ("speed.png", "loss.png")]
    assert files == [*pictures, page, readme] and all(path.exists() for path in files)
    short = readme.read_text()
    assert "TEST DATA, 124.0M parameters, B=32, T=1024, bfloat16:" in short
    assert re.search(r"\| fastgpt \| [\d,]+ \| 1.29x \| 17.00 \| [\d.]+ \|\n", short)
    assert "](bench/results/test-data/speed.png)" in short
    text = page.read_text()
    assert text.startswith("# title\n") and text.endswith("the end\n")
    assert publish.NOTHING not in text
    titles = [f"**{b} sequences of 1024 tokens**" for b in (4, 32, 64)]
    assert sorted(titles, key=text.index) == titles
    for run in map(made_up, (4, 32, 64)):
        ours, best = run["variants"]["fastgpt"], run["variants"]["sdpa_autotune"]
        assert run["baseline"] == "sdpa_autotune"
        assert ours["speedup"] == pytest.approx(62 / 48) and best["speedup"] == 1.0
        cells = re.search(r"\| fastgpt \| ([^|]+) \| 1.29x \| ", report_of(run))
        assert cells is not None and cells[1] == f"{ours['tokens_per_s']['median']:,.0f}"
        assert report_of(run) in text
        assert f"| {ours['peak_memory_bytes'] / 1e9:.2f} | 14.0/5.00 | {ours['loss']:.4f}" in text
    assert text.count("nanoGPT, masked matmul: out of memory") == 1
    assert text.count("124.0M parameters, bfloat16; 2000-01-01, commit `0123456789ab`;") == 3
    assert text.count("driver 0.0, CUDA 0.3, PyTorch 0.1, Triton 0.2.") == 3
    assert text.count("fastgpt measured twice: 0.6% apart") == 3
    assert text.count("Speed-up: over nanoGPT, SDPA, torch.compile (max-autotune).") == 3
    assert "700 and 700 TFLOP/s, 4.00 and 4.00 TB/s" in text
    columns = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert columns == {10}
    for path in pictures:
        assert f"](../bench/results/test-data/{path.name})" in text


def report_of(run: dict[str, Any]) -> str:
    return "\n".join(report.markdown(run))


def drawn(monkeypatch: pytest.MonkeyPatch, run: dict[str, Any]) -> dict[str, Any]:
    """The plots by name, as matplotlib figures."""
    figures: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: figures.update({path.name: self}))
        for name, draw in pictures.PICTURES.items():
            draw([run], Path(name))
    return figures


def test_bars_and_curves_are_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plots show a run's figures; one variant ran out of memory."""
    run = made_up(64)
    saved, variants = drawn(monkeypatch, run), run["variants"].values()
    (axes,) = saved["speed"].axes
    speeds = [v["tokens_per_s"]["median"] for v in variants if v["tokens_per_s"]]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx(speeds)
    assert axes.get_ylim() == (len(variants) - 0.5, -0.5)  # all bars are visible
    assert [t.get_text() for t in axes.get_yticklabels()] == [v["label"] for v in variants]
    assert [t.get_text() for t in axes.texts][:2] == ["out of memory", f"{speeds[0]:,.0f}  0.62x"]
    whiskers = [segment for lines in axes.collections for segment in lines.get_segments()]
    for whisker, variant in zip(whiskers, list(variants)[1:], strict=True):
        ends = [variant["tokens_per_s"]["p10"], variant["tokens_per_s"]["p90"]]
        assert [x for x, _ in whisker] == pytest.approx(ends)

    left, right = saved["loss"].axes
    with_losses = [v for v in variants if v["losses"]]
    assert list(left.lines[0].get_ydata()) == run["reference_losses"]
    assert [list(line.get_ydata()) for line in left.lines[1:]] == [v["losses"] for v in with_losses]
    for line, variant in zip(right.lines[1:], with_losses, strict=True):
        assert max(map(abs, line.get_ydata())) == variant["largest_deviation"]


def test_a_run_without_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_up(32)
    run["reference_losses"] = []
    assert "Loss: after 100 steps" in report.notes(run)
    left, _ = drawn(monkeypatch, run)["loss"].axes
    assert len(left.lines) == len(run["variants"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": {"device": "cpu"}}, "must be measured on a CUDA GPU, got cpu"),
        ({"complete": False}, "must be complete, but was cut off"),
        ({"sdpa": ...}, "run-b4.json is no record of bench/run.py: it has no sdpa"),
        ({"variants": [1]}, "run-b4.json is no record of bench/run.py: AttributeError"),
        ({"options": {"batch_size": 8}}, "must be called run-b8.json, after its batch size"),
    ],
    ids=["cpu", "incomplete", "record", "shape", "name"],
)
def test_what_cannot_be_published(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    results, *texts = written(tmp_path, made_up(4))
    before = [path.read_text() for path in texts]
    run = {key: value for key, value in (made_up(4) | change).items() if value is not ...}
    (results / "test-data" / "run-b4.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match=message):
        publish.publish(results, *texts)
    assert [path.read_text() for path in texts] == before


def test_files_that_are_no_records(tmp_path: Path) -> None:
    results, *_ = written(tmp_path, made_up(4))
    path = results / "test-data" / "run-b32.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="run-b32.json is no JSON"):
        publish.read(results)
    path.write_text('{"created": ""}')
    with pytest.raises(ValueError, match="is no record of bench/run.py: it has no complete, mach"):
        publish.read(results)
    other = made_up(32)
    other["machine"]["gpu"] = "ANOTHER"
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="must hold runs of one GPU, got ANOTHER, TEST DATA"):
        publish.read(results)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, readme, page = written(tmp_path)
    monkeypatch.setattr(publish, "RESULTS", results)
    monkeypatch.setattr(publish, "README", readme)
    monkeypatch.setattr(publish, "PAGE", page)
    assert publish.main() == 0
    assert f"wrote {readme}" in capsys.readouterr().out
    readme.write_text("no markers\n")
    with pytest.raises(SystemExit):
        publish.main(["--help"])
    assert publish.main() == 2
    assert "README.md must have one line" in capsys.readouterr().err
    assert readme.read_text() == "no markers\n"
    readme.unlink()
    assert publish.main() == 2
    assert capsys.readouterr().err == f"error: No such file or directory: {readme}\n"
