"""Arguments of the benchmarks: rejected values, run.py's --quick, and missing packages, which are
reported before anything is measured."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bench import attention_map, bench_decode, gpu_report, roofline, run, scaling, translation
from bench._harness import cli
from bench._ops import determinism
from bench._step import profile, variants
from tests.bench.test_bench import TINY
from tests.tools.small_runs import data_set

HERE = Path(__file__).parent
RUN, ROOFLINE, SCALING, REPORT = run.main, roofline.main, scaling.main, gpu_report.main
DECODE, PROFILE, DETERMINISM = bench_decode.main, profile.main, determinism.main
MAP, TRANSLATION = (partial(cli.exit_of, p.main) for p in (attention_map, translation))


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (RUN, "--rounds=0", "rounds must be at least 1, got 0"),
        (RUN, "--loss_steps=1", "loss_steps must be at least 2, got 1"),
        (RUN, "--learning_rate=0", "learning_rate must be positive and finite, got 0"),
        (RUN, "--learning_rate=inf", "learning_rate must be positive and finite, got inf"),
        (RUN, "--steps=16777216", "steps must be below 16777216, got 16777216"),
        (RUN, "--seed=-1", "seed must be at least 0, got -1"),
        (DECODE, "--prompt=0", "prompt must be at least 1, got 0"),
        (DECODE, f"--out={__file__}/x", f"out must lie in a folder, but {__file__} is a file"),
        (PROFILE, "", "the following arguments are required: out"),
        (PROFILE, __file__, f"out must be a folder, but {__file__} is a file"),
        (DETERMINISM, f"{__file__}/x", f"out must be a folder, but {__file__} is a file"),
        (REPORT, f"--out={__file__}", f"out must be a folder, but {__file__} is a file"),
        (RUN, "--n_head=3", "n_embd must be a multiple of n_head"),
        (RUN, "--batch_size=0", "batch_size must"),
        (RUN, "--vocab_size=20", "ids must lie below vocab_size=20"),
        (RUN, "--data_dir=nowhere", "nowhere/train.bin is not a file"),
        (RUN, "--variants", "variants must be one or more of sdpa_compile, fastgpt_train, "),
        (RUN, "--variants sdpa sdpa", "each once, got sdpa sdpa"),
        (RUN, "--variants=eager", "each once, got eager"),
        (RUN, "--bias=maybe", "must be True or False, got 'maybe'"),
        (RUN, "--dtype=int8", "invalid choice: 'int8'"),
        (RUN, "--bach_size=3", "--bach_size=3"),
        (RUN, f"--out={__file__}", f"out must be a folder, but {__file__} is a file"),
        (ROOFLINE, "--variant sdpa sdpa", "each once, got sdpa sdpa"),
        (ROOFLINE, "--variant", "variant must be one or more of naive, sdpa, fastgpt"),
        (ROOFLINE, "--batch_size=0", "batch_size must be at least 1, got 0"),
        (ROOFLINE, "--tbps=nan", "tbps must be positive and finite, got nan"),
        (
            ROOFLINE,
            "--params=float16",
            "params must be float32 or the dtype (bfloat16), got 'float16'",
        ),
        (SCALING, "--gpus 4 12", "gpus_per_node (8) or multiples of it, got 12"),
        (SCALING, "--gpus", "or multiples of it, got none"),
        (SCALING, "--batch_size=0", "batch_size must be at least 1, got 0"),
        (REPORT, "--minutes=0", "minutes must be positive and finite, got 0"),
        (REPORT, "--minutes=nan", "minutes must be positive and finite, got nan"),
        (TRANSLATION, "--pairs=absent", "No such file or directory: absent"),
        (TRANSLATION, "--pairs=absent --beam=0", "beam must be at least 1, got 0"),
        (TRANSLATION, "--pairs=absent --max_iters=0", "max_iters must be at least 1, got 0"),
        (TRANSLATION, "--pairs=absent --catalogs=absent", "catalogs must be a folder, got absent"),
        (
            TRANSLATION,
            f"--pairs=x --catalogs={HERE}",
            f"catalogs must hold .mo files with texts, got {HERE}",
        ),
        (TRANSLATION, f"--pairs={'x' * 300}", "File name too long: xxx"),
        (MAP, "--model=absent --text=a", "there is no model absent/ckpt.pt"),
        (REPORT, "--only=nothing", "argument --only: invalid choice: 'nothing'"),
    ],
)
def test_refused_arguments(
    program: Callable[[list[str]], int],
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    small = [*TINY, f"--out={tmp_path / 'out'}"] if program is RUN else []
    try:
        code = program([*small, *arguments.split()])
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_quick_is_short_and_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--quick sets steps and variants unless the command line does."""
    planned: list[variants.Plan] = []

    def noted(plan: variants.Plan, *_: Any) -> None:
        planned.append(plan)
        raise StopIteration

    monkeypatch.setattr(run, "_measure", noted)
    with pytest.raises(StopIteration):
        run.main(["--quick", "--steps=3", f"--data_dir={data_set(tmp_path)}", f"--out={tmp_path}"])
    (options,) = (plan.options for plan in planned)
    assert options.variants == ("sdpa_compile", "fastgpt_train", "fastgpt", "sdpa")
    assert (options.loss_steps, options.rounds, options.steps) == (50, 3, 3)


def test_matplotlib_is_missed_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run.main([*TINY, f"--data_dir={data_set(tmp_path)}", f"--out={tmp_path}"]) == 2
    assert 'pip install -e ".[bench]"' in capsys.readouterr().err
