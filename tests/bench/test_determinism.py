"""bench/_ops/determinism.py at sizes for a CPU: every op again and again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench._ops import determinism


def read(folder: Path) -> Any:
    return json.loads((folder / "determinism.json").read_text())


@pytest.fixture
def on_cpu() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernels would be compiled; the program itself is for that")
    yield


@pytest.mark.usefixtures("on_cpu")
def test_every_op_is_run_and_found_deterministic(tmp_path: Path) -> None:
    sizes = {name: {k: min(v, 32) for k, v in one.items()}
             for name, one in determinism.SMALL_SIZES.items()}  # fmt: skip
    assert determinism.determinism(tmp_path, repeats=2, sizes=sizes) == 0
    data = read(tmp_path)
    assert list(data) == list(determinism.SMALL_SIZES)
    assert all(one["repeats"] == 2 and one["different"] == 0 for one in data.values())


@pytest.mark.usefixtures("on_cpu")
def test_an_op_that_fails_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(x: Any) -> Any:
        raise RuntimeError("broken kernel\nand more")

    gelu = determinism.BENCHMARKS["gelu"]
    faulty = replace(gelu)
    object.__setattr__(faulty, "function", lambda provider: broken)
    monkeypatch.setattr(determinism, "BENCHMARKS", {"faulty": faulty, "gelu": gelu})
    sizes = {name: {"M": 3, "N": 4} for name in ("faulty", "gelu")}
    assert determinism.determinism(tmp_path, repeats=2, sizes=sizes) == 1
    found = read(tmp_path)
    assert found["faulty"]["different"] == "RuntimeError: broken kernel"
    assert found["gelu"]["different"] == 0 and "and more" in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
def test_an_op_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = determinism.BENCHMARKS["gelu"]
    noisy = replace(op)
    object.__setattr__(noisy, "function", lambda provider: lambda x: x * torch.rand(()))
    monkeypatch.setattr(determinism, "BENCHMARKS", {"gelu": noisy})
    sizes = {"gelu": {"M": 3, "N": 4}}
    assert determinism.determinism(tmp_path, repeats=5, sizes=sizes) == 1
    assert read(tmp_path)["gelu"]["different"] == 4


@pytest.mark.usefixtures("on_cpu")
def test_small_shapes_run(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {name: {k: min(v, 65) for k, v in one.items()}
             for name, one in determinism.SMALL_SIZES.items()}  # fmt: skip
    assert determinism.small(sizes) == 0
    assert capsys.readouterr().out.split() == [
        word for name in determinism.SMALL_SIZES for word in ("op:", name)
    ]
