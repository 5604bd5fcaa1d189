"""bench/run.py: a complete run at a tiny size, and the arithmetic behind its figures."""

import functools
import json
import math
import os
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import run as bench
from bench._harness import machine
from bench._step import measurement, report, variants
from tests.tools.small_runs import data_set

TINY = (
    "--batch_size=3 --block_size=16 --n_layer=1 --n_head=2 --n_embd=16 --loss_steps=4 --warmup=1 "
    "--rounds=3 --steps=2 --dtype=float32 --learning_rate=0.01"
).split()
EAGER = "naive huggingface sdpa fastgpt fastgpt_recompute fastgpt_train fastgpt_again".split()
BOTH = ("fastgpt", "sdpa")


def measured(folder: Path, *more: str) -> dict[str, Any]:
    """The record of a tiny run on a small data set."""
    return _measured(folder, f"--data_dir={data_set(folder)}", *more)


def _measured(folder: Path, *more: str) -> dict[str, Any]:
    assert bench.main([*TINY, f"--out={folder}", *more]) == 0
    record: dict[str, Any] = json.loads((folder / "run-b3.json").read_text())
    return record


@pytest.fixture(scope="module", autouse=True)
def _ceilings_once() -> Iterator[None]:
    """Measure the machine's ceilings only in the first run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "ceilings", functools.cache(machine.ceilings))
        yield


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("eager")
    yield folder, _measured(folder, "--variants", *EAGER)


def text_of(table: Any) -> str:
    """The table as an 80-column terminal shows it."""
    console = Console(width=80, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# -- a whole run


def test_record_is_complete(eager: tuple[Path, dict[str, Any]]) -> None:
    _, record = eager
    assert record.keys() >= {"created", "notes", "options", "dtype", "data", "sdpa", "ceilings"}
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"].keys() >= {"device", "cpu", "python", "triton", "cuda", "cudnn"}
    assert len(record["machine"]["commit"] or 40 * "?") == 40
    assert record["options"]["rounds"] == 3 and record["dtype"] == "float32"
    assert record["data"]["source"] == "built-in corpus"
    assert record["data"]["train_tokens"] > 1_000_000
    for when in ("before", "after"):
        ceiling = record["ceilings"][when]
        assert ceiling["matmul_tflops"] > 0 and ceiling["copy_tb_per_s"] > 0
    assert list(record["variants"]) == list(EAGER)
    for variant in record["variants"].values():
        assert variant["failure"] is None
        assert variant["cold_start_s"] > 0 and variant["warm_start_s"] > 0
        assert [len(times) for times in variant["step_ms"]] == [2, 2, 2]


def test_speeds_follow_from_the_step_times(eager: tuple[Path, dict[str, Any]]) -> None:
    _, record = eager
    assert record["tokens_per_step"] == 3 * 16
    for variant in record["variants"].values():
        times = [ms for turn in variant["step_ms"] for ms in turn]
        ms, speed = variant["ms_per_step"], variant["tokens_per_s"]
        assert ms["median"] == pytest.approx(statistics.median(times))
        assert min(times) <= ms["p10"] <= ms["median"] <= ms["p90"] <= max(times)
        for low, high in (("median", "median"), ("p10", "p90"), ("p90", "p10")):
            assert speed[low] * ms[high] / 1e3 == pytest.approx(record["tokens_per_step"])
    fast, plain, again = (
        record["variants"][name]["tokens_per_s"]["median"] for name in (*BOTH, "fastgpt_again")
    )
    assert record["over_eager"] == pytest.approx(fast / plain)
    assert record["noise"] == pytest.approx(abs(again / fast - 1))


def test_losses_agree_with_the_reference_and_fall(eager: tuple[Path, dict[str, Any]]) -> None:
    _, record = eager
    reference = record["reference_losses"]
    assert len(reference) == 4 and reference[-1] < reference[0]
    for variant in record["variants"].values():
        assert variant["losses"] == pytest.approx(reference, abs=1e-4)
        distances = [a - b for a, b in zip(variant["losses"], reference, strict=True)]
        assert variant["loss"] == variant["losses"][-1]
        assert variant["largest_deviation"] == max(map(abs, distances))


def test_chart_is_a_png_and_nothing_is_replaced(
    eager: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = eager
    chart = folder / "run-b3.png"
    before = chart.read_bytes()
    assert before.startswith(b"\x89PNG\r\n\x1a\n")
    assert bench.main([*TINY, f"--out={folder}"]) == 2
    assert str(folder / "run-b3.json") in capsys.readouterr().err
    assert chart.read_bytes() == before


def test_the_table(eager: tuple[Path, dict[str, Any]]) -> None:
    """The table fits into 80 columns, and a CPU run claims nothing about GPUs."""
    _, record = eager
    text = text_of(report.table(record))
    assert "…" not in text
    for name, variant in record["variants"].items():
        assert name in text
        assert f"{variant['tokens_per_s']['median']:,.0f}" in text
    fast, plain = (record["variants"][name]["tokens_per_s"]["median"] for name in BOTH)
    assert f"fastgpt over nanoGPT, SDPA: {fast / plain:.2f}x" in text
    assert "Short run: loss_steps=4" in text.replace("\n", " ")
    if not torch.cuda.is_available():
        assert record["machine"]["device"] == "cpu" and record["sdpa"] is None
        assert report.title(record).startswith(report.CPU_NOTE)
        assert text.count(report.CPU_NOTE) == 2
        assert all(v["peak_memory_bytes"] is None for v in record["variants"].values())


@pytest.mark.slow
def test_a_compiled_variant_is_what_speed_ups_refer_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.utils.counters.clear()
    keep = str(tmp_path / "cache")  # Inductor sets it itself if it is not set
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", keep)
    record = measured(tmp_path, "--variants", "sdpa", "sdpa_compile")
    compiled = record["variants"]["sdpa_compile"]
    if compiled["failure"] is not None:
        pytest.skip(compiled["failure"])
    assert record["data"]["source"] == "small"
    assert record["baseline"] == "sdpa_compile" and compiled["speedup"] == 1.0
    eager_speed = record["variants"]["sdpa"]
    ratio = eager_speed["tokens_per_s"]["median"] / compiled["tokens_per_s"]["median"]
    assert eager_speed["speedup"] == pytest.approx(ratio)
    hits = torch._dynamo.utils.counters["inductor"]
    assert hits["fxgraph_cache_miss"] > 0 and hits["fxgraph_cache_hit"] > 0  # cold, then warm
    assert compiled["losses"] == pytest.approx(record["reference_losses"], abs=1e-4)
    assert os.environ.get("TORCHINDUCTOR_CACHE_DIR") == keep


# -- variants that cannot be measured


def failing(monkeypatch: pytest.MonkeyPatch, label: str, after: int, error: Any) -> None:
    """Let the variant raise ``error`` after ``after`` steps, or diverge if it is None."""
    init = variants.Training.__init__

    @functools.wraps(init)
    def limited(self: Any, variant: Any, *args: Any) -> None:
        init(self, variant, *args)
        step, left = self.step, iter(range(after))

        def failing_step() -> torch.Tensor:
            if next(left, None) is not None:
                return step()
            if error is None:
                return step() * math.nan
            raise error

        if variant.label == label:
            self.step = failing_step

    monkeypatch.setattr(variants.Training, "__init__", limited)


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")
BROKEN = RuntimeError("broken kernel\nand many lines more")


@pytest.mark.parametrize(
    ("after", "error", "failure"),
    [
        (6, OUT_OF_MEMORY, "out of memory"),  # while measured with the others
        (0, BROKEN, "RuntimeError: broken kernel"),  # while measured alone
        (0, None, "the loss is nan at step 1"),
    ],
    ids=str,
)
def test_an_error_ends_one_variant_only(
    after: int,
    error: Any,
    failure: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch, variants.VARIANTS["sdpa"].label, after, error)
    record = measured(tmp_path, "--variants", "sdpa", "fastgpt")
    failed, fine = record["variants"]["sdpa"], record["variants"]["fastgpt"]
    assert record["complete"] and failed["failure"] == failure
    assert failed["tokens_per_s"] is failed["ms_per_step"] is failed["speedup"] is None
    assert fine["failure"] is None and len(fine["step_ms"]) == 3 and fine["loss"] > 0
    assert ("and many lines more" in capsys.readouterr().err) == (error is BROKEN)
    assert f"nanoGPT, SDPA: {failure}" in text_of(report.table(record))


def test_an_error_in_the_reference_ends_the_reference_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, variants.VARIANTS["naive"].label, 0, BROKEN)
    record = measured(tmp_path, "--variants=fastgpt")
    fine = record["variants"]["fastgpt"]
    assert record["reference_failure"] == "RuntimeError: broken kernel"
    assert record["reference_losses"] == [] and fine["largest_deviation"] is None
    assert fine["failure"] is None and fine["tokens_per_s"]
    assert "No float32 losses: Runt" in text_of(report.table(record))


def test_nothing_to_measure_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, variants.VARIANTS["sdpa"].label, 0, BROKEN)
    options = [*TINY, "--reference=False", "--variants=sdpa", f"--out={tmp_path}"]
    assert bench.main([*options, f"--data_dir={data_set(tmp_path)}"]) == 1
    record = json.loads((tmp_path / "run-b3.json").read_text())
    assert record["variants"]["sdpa"]["failure"] == "RuntimeError: broken kernel"


# -- interrupted runs


def test_an_interrupt_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is on disk before the interrupt, so that a killed run keeps it, too."""
    turn, left = measurement._turn, iter(range(3))
    at_interrupt: list[dict[str, Any]] = []

    def interrupted(*args: Any) -> list[float]:
        if next(left, None) is None:
            at_interrupt.append(json.loads((tmp_path / "run-b3.json").read_text()))
            raise KeyboardInterrupt
        return turn(*args)

    monkeypatch.setattr(measurement, "_turn", interrupted)
    options = [*TINY, f"--out={tmp_path}", f"--data_dir={data_set(tmp_path)}"]
    assert bench.main([*options, "--variants", "sdpa", "fastgpt"]) == 130
    record = json.loads((tmp_path / "run-b3.json").read_text())
    for found in (*at_interrupt, record):
        assert found["complete"] is False and found["ceilings"]["after"] is None
        turns = {name: len(v["step_ms"]) for name, v in found["variants"].items()}
        assert turns == {"sdpa": 1, "fastgpt": 2}  # each round starts with a different variant
        assert len(found["reference_losses"]) == 4
        assert all(v["tokens_per_s"] for v in found["variants"].values())
    assert (tmp_path / "run-b3.png").exists()
    assert "Not complete" in text_of(report.table(record))


# -- variants that do not fit into memory together


def test_groups_that_fit() -> None:
    footprints = {name: measurement.Footprint(10, 30) for name in "abcd"}
    footprints["e"] = measurement.Footprint(50, 50)  # a CUDA graph keeps its memory between steps
    fit = functools.partial(measurement.groups_that_fit, "abcde", footprints=footprints, base="b")
    assert fit(capacity=math.inf) == [["b", "a", "c", "d", "e"]]
    assert fit(capacity=110) == [["b", "a", "c", "d", "e"]]  # 4 x 10 + 50 kept, 20 more in a step
    assert fit(capacity=109) == [["b", "a", "c", "d"], ["b", "e"]]
    assert fit(capacity=50) == [["b", "a", "c"], ["b", "d"], ["b", "e"]]
    assert fit(capacity=1) == [["b", name] for name in "acde"]


def only_two_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no more than two variants fit into memory at a time."""
    alone = measurement._measure_alone

    def footprint(*args: Any) -> measurement.Footprint:
        alone(*args)
        return measurement.Footprint(40, 60)

    monkeypatch.setattr(measurement, "_measure_alone", footprint)
    monkeypatch.setattr(measurement, "_capacity", lambda device: 100.0)


def test_groups_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_two_fit(monkeypatch)
    names = ("fastgpt", "sdpa", "fastgpt_again")
    record = measured(tmp_path, "--reference=False", "--variants", *names)
    groups = record["groups"]
    assert [group["variants"] for group in groups] == [
        ["sdpa", "fastgpt"],
        ["sdpa", "fastgpt_again"],
    ]
    assert all(len(group["base_step_ms"]) == 3 for group in groups)
    assert groups[0]["base_step_ms"] == record["variants"]["sdpa"]["step_ms"]
    assert all(len(variant["step_ms"]) == 3 for variant in record["variants"].values())
    assert record["over_eager"] > 0 and record["noise"] is not None
    assert "In 2 groups that fit into memory, nanoGPT, SDPA in each" in text_of(
        report.table(record)
    )


def test_a_base_that_fails_later_keeps_what_the_first_group_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_two_fit(monkeypatch)
    measure_group = measurement.Measurement._measure_group

    def later(self: Any, group: Any) -> None:
        if group is not self.groups[0]:
            monkeypatch.setattr(measurement, "_turn", lambda *_: 1 / 0)
        measure_group(self, group)

    monkeypatch.setattr(measurement.Measurement, "_measure_group", later)
    names = ("fastgpt", "sdpa", "fastgpt_again")
    record = measured(tmp_path, "--reference=False", "--variants", *names)
    variants = record["variants"]
    assert variants["sdpa"]["failure"] is None and variants["sdpa"]["tokens_per_s"]
    assert record["over_eager"] > 0 and len(record["groups"]) == 2
    assert "ZeroDivisionError" in variants["fastgpt_again"]["failure"]


def test_a_diverged_training_is_no_measurement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*TINY, f"--out={tmp_path}", f"--data_dir={data_set(tmp_path)}"]
    assert bench.main([*options, "--learning_rate=1e30"]) == 2
    said = r"error: the float32 reference cannot be trained: the loss is (nan|inf) at step [1-4]"
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "run-b3.json").exists()


def test_a_model_that_a_variant_cannot_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = measured(tmp_path, "--variants", "huggingface", "fastgpt", "--bias=False")
    assert record["variants"]["huggingface"]["failure"] == "transformers' GPT-2 always has biases"
    assert record["variants"]["fastgpt"]["failure"] is None
    monkeypatch.setattr(variants, "_has_fp8", lambda device: True)
    options = [
        *TINY,
        f"--out={tmp_path / 'out'}",
        f"--data_dir={tmp_path / 'small'}",
        "--vocab_size=50257",
    ]
    assert bench.main([*options, "--variants", "sdpa", "fastgpt_fp8_head"]) == 2
    assert "vocab_size must be a multiple of 16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- arithmetic


def test_the_fastest_compiled_variant_is_the_baseline() -> None:
    times = {"sdpa_compile": 20.0, "sdpa_autotune": 10.0, "fastgpt": 5.0, "fastgpt_again": 4.0}
    results = {
        name: report.Result("", losses=[2.0, 1.5], step_ms=[[ms, ms]]) for name, ms in times.items()
    }
    record = report.record(results, [2.25, 1.0], 100)
    assert record["baseline"] == "sdpa_autotune"
    speedups = [variant["speedup"] for variant in record["variants"].values()]
    assert speedups == pytest.approx([0.5, 1.0, 2.0, 2.5])
    assert record["noise"] == pytest.approx(0.25)
    assert record["variants"]["fastgpt"]["tokens_per_s"]["median"] == pytest.approx(20_000)
    assert record["variants"]["fastgpt"]["largest_deviation"] == 0.5


def test_ratios_are_of_one_group() -> None:
    """Here the machine is half as fast while it measures the second group."""
    times = {"sdpa": 10.0, "fastgpt": 5.0, "sdpa_graphs": 16.0, "fastgpt_again": 10.0}
    results = {name: report.Result("", step_ms=[[ms]]) for name, ms in times.items()}
    groups = [
        report.Group("sdpa", ["sdpa", "fastgpt"], [[10.0]]),
        report.Group("sdpa", ["sdpa", "sdpa_graphs", "fastgpt_again"], [[20.0]]),
    ]
    record = report.record(results, [], 100, groups)
    assert record["baseline"] == "sdpa_graphs" and record["noise"] == 0.0
    speedups = [variant["speedup"] for variant in record["variants"].values()]
    assert speedups == pytest.approx([0.8, 1.6, 1.0, 1.6])
    assert record["over_eager"] == 2.0
