"""bench/run.py: arguments that are refused, what --quick stands for, and packages that are missed
before anything is measured."""

from pathlib import Path
from typing import Any

import pytest

from bench import run as bench
from bench._step import variants
from tests.bench.test_bench import TINY
from tests.tools.small_runs import data_set


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--rounds=0", "rounds must be at least 1, got 0"),
        ("--loss_steps=1", "loss_steps must be at least 2, got 1"),
        ("--learning_rate=0", "learning_rate must be positive, got 0"),
        ("--n_head=3", "n_embd must be a multiple of n_head"),
        ("--batch_size=0", "batch_size must"),
        ("--vocab_size=20", "ids must lie below vocab_size=20"),
        ("--data_dir=nowhere", "nowhere/train.bin is not a file"),
        ("--variants=fastgpt,fastgpt", "fastgpt,fastgpt"),
        ("--bias=maybe", "must be True or False, got 'maybe'"),
        ("--dtype=int8", "invalid choice: 'int8'"),
        ("--bach_size=3", "--bach_size=3"),
        (f"--out={__file__}", f"out must be a folder, but {__file__} is a file"),
    ],
)
def test_refused_arguments(
    argument: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = bench.main([*TINY, f"--out={tmp_path / 'out'}", argument])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_quick_is_short_and_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps and variants, unless the command line says otherwise."""
    planned: list[variants.Plan] = []

    def noted(plan: variants.Plan, *_: Any) -> None:
        planned.append(plan)
        raise StopIteration

    monkeypatch.setattr(bench, "_measure", noted)
    with pytest.raises(StopIteration):
        bench.main(
            ["--quick", "--steps=3", f"--data_dir={data_set(tmp_path)}", f"--out={tmp_path}"]
        )
    (options,) = (plan.options for plan in planned)
    assert options.variants == ("sdpa_compile", "fastgpt_train", "fastgpt", "sdpa")
    assert (options.loss_steps, options.rounds, options.steps) == (50, 3, 3)


def test_matplotlib_is_missed_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert bench.main([*TINY, f"--data_dir={data_set(tmp_path)}", f"--out={tmp_path}"]) == 2
    assert 'pip install -e ".[bench]"' in capsys.readouterr().err
