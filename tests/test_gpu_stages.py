"""What the stages of bench/gpu_report.py find, at sizes for a CPU, and how it is shown."""

import ast
import functools
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _determinism
import _profile
import _stages
import _training
import _visit_report
import pytest
import run as bench_run
import torch
from _ceilings import Ceilings, floor
from _visit import Stage, read_json
from _visit_report import markdown
from small_visits import CEILINGS, FACTS, records

from fastgpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent

# -- parity

TESTS = """
import os
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("dtype", ["torch.float16", "torch.bfloat16"])
def test_passes(dtype):
    pass

def test_fails():
    assert 1 == 2, "off by one"

def test_skips():
    pytest.skip("no such GPU")

def test_breaks_the_gpu():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_runs_out_of_memory():
    raise RuntimeError("CUDA error: out of memory")

def test_dies():
    os._exit(3)

def test_comes_last():
    pass
"""


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parity")
    (folder / "test_toy.py").write_text(TESTS)
    (folder / "test_other.py").write_text("import nothing_of_this_name\n")
    command = functools.partial(_stages.parity_command, workers=2, paths=(str(folder),))
    return records(Stage("parity", command, _stages.parity, 1.0, 0.0))["parity"]


def test_every_result_of_the_tests_is_counted(parity: dict[str, Any]) -> None:
    data = parity["data"]
    assert parity["status"] == "failed"
    assert data["counts"] == {
        "other": {"failed": 1},
        "toy": {"failed": 4, "skipped": 1, "passed": 1},
        "toy bfloat16": {"passed": 1},
        "toy float16": {"passed": 1},
    }
    assert (data["passed"], data["failed"], data["skipped"]) == (3, 5, 1)
    why = {one["test"].rpartition("::")[2]: one["message"] for one in data["failures"]}
    assert "off by one" in why["test_fails"]
    assert "illegal memory access" in why["test_breaks_the_gpu"]  # its worker ended there
    assert "out of memory" in why["test_runs_out_of_memory"]
    assert "crashed" in why["test_dies"]
    assert any("nothing_of_this_name" in message for message in why.values())
    assert data["not_ended"] == []


def test_a_test_run_that_was_cut_off_says_where(tmp_path: Path) -> None:
    lines = [
        {"test": "tests/test_mlp.py::test_a[cuda-torch.float32]", "outcome": "started"},
        {"test": "tests/test_mlp.py::test_a[cuda-torch.float32]", "outcome": "passed"},
        {"test": "tests/test_mlp.py::test_b", "outcome": "started"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "results.jsonl").write_text(text + '{"test": "tests/te')
    data = _stages.parity(tmp_path)
    assert data["counts"] == {"mlp float32": {"passed": 1}}
    assert data["not_ended"] == ["tests/test_mlp.py::test_b"]
    assert _stages.parity(tmp_path / "none")["passed"] == 0


def test_it_runs_the_tests_that_need_a_gpu() -> None:
    command = _stages.parity_command(Path("folder"), 60.0, 0, ["tests/test_gelu.py"])
    collected = subprocess.run(
        [*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / n) for n in ("bench", "."))},
    ).stdout  # fmt: skip
    tests = [line for line in collected.splitlines() if "::" in line]
    assert tests and all("[cuda" in test for test in tests)


# -- ops


def test_op_benchmarks_are_collected_in_the_order_of_worth() -> None:
    import _visit_plugin
    import bench_gelu

    class Item:
        def __init__(self, row: Any) -> None:
            self.callspec = type("Spec", (), {"params": {"row": row}})()

    items: list[Any] = [Item(row) for row in bench_gelu.OP._rows()]
    _visit_plugin.pytest_collection_modifyitems(items)
    providers = [item.callspec.params["row"].provider for item in items]
    first_compiled = providers.index("compile")
    assert set(providers[first_compiled:]) == {"compile"}
    assert providers[0] == "fused"


def test_rows_of_the_op_benchmarks_are_read() -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the sizes are large")
    command = functools.partial(
        _stages.ops_command, paths=("bench/bench_gelu.py", "-k", "eager and forward")
    )
    record = records(Stage("ops", command, _stages.ops, 1.0, 0.0))["ops"]
    assert record["status"] == "done", record["output"]
    rows = record["data"]["rows"]
    assert {(row["op"], row["provider"]) for row in rows} == {("gelu", "eager")}
    assert all(row["ms"] > 0 for row in rows) and record["data"]["failures"] == []


# -- runs


@pytest.mark.parametrize("batch_size", _stages.BATCHES)
def test_a_run_is_as_long_as_its_time_allows(
    batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[list[str]] = []

    def main(arguments: list[str]) -> int:
        given.append(arguments)
        return 0

    monkeypatch.setattr(bench_run, "main", main)
    assert _stages.run(tmp_path, 1000.0, batch_size) == 0
    assert _stages.run(tmp_path, 60.0, batch_size) == 0
    long, short = given
    common = {f"--batch_size={batch_size}", f"--out={tmp_path / 'run'}"}
    losses = {"--loss_steps=200" if batch_size == 4 else "--reference=False"}
    assert set(long) == common | losses
    assert {"--rounds=3", "--steps=10", "sdpa_compile", "fastgpt_train", *common, *losses} <= set(
        short
    )
    assert "naive" not in short and sum("loss_steps" in a for a in short) == 1


# -- profile


def test_the_time_of_a_step_by_kind_of_work(tmp_path: Path) -> None:
    options = replace(
        _training.CPU_OPTIONS, batch_size=2, block_size=16, n_layer=1, n_head=2, n_embd=16
    )
    if torch.cuda.is_available():
        options = replace(options, block_size=64, n_embd=64)
    assert _profile.profile(tmp_path, options) == 0
    found = read_json(tmp_path / "profile.json")
    assert list(found["variants"]) == ["fastgpt_train", "fastgpt"]
    for data in found["variants"].values():
        kinds = data["kinds"]
        assert data["step_ms"] > 0 and data["kernels"]
        assert sum(kind["share"] for kind in kinds) == pytest.approx(1.0)
        assert sum(kind["ms"] for kind in kinds) == pytest.approx(data["kernels_ms"])
        assert {"attention", "matrix products", "optimizer"} <= {kind["kind"] for kind in kinds}


def test_a_variant_that_cannot_be_profiled_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def profiled(training: Any, device: Any) -> tuple[float, list[dict[str, Any]]]:
        if training._step is not None:
            raise RuntimeError("broken kernel\nand more")
        return 1.0, [{"name": "gelu", "calls": 1.0, "ms": 0.5}]

    monkeypatch.setattr(_profile, "_profiled", profiled)
    options = replace(
        _training.CPU_OPTIONS, batch_size=2, block_size=16, n_layer=1, n_head=2, n_embd=16
    )
    assert _profile.profile(tmp_path, options) == 1
    found = read_json(tmp_path / "profile.json")["variants"]
    assert found["fastgpt_train"] == {"failure": "RuntimeError: broken kernel"}
    assert found["fastgpt"]["step_ms"] == 1.0
    assert "broken kernel" in _visit_report._profile(
        {"batch_size": 2, "block_size": 16, "variants": found}
    )
    assert "and more" in capsys.readouterr().err


def test_shares_and_ratios_by_hand() -> None:
    kernels = [
        {"name": "nvjet_tst_128x128", "calls": 2.0, "ms": 6.0},
        {"name": "_attention_fwd_kernel", "calls": 1.0, "ms": 3.0},
        {"name": "Memcpy HtoD", "calls": 1.0, "ms": 1.0},
    ]
    data = _profile.by_kind(kernels, {"matrix products": 4.0, "attention": 2.0, "optimizer": 1.0})
    kinds = {kind["kind"]: kind for kind in data["kinds"]}
    assert data["kernels_ms"] == 10.0 and data["floor_ms"] == 7.0
    assert kinds["matrix products"] == {"kind": "matrix products", "ms": 6.0, "share": 0.6,
                                        "floor_ms": 4.0, "ratio": 1.5}  # fmt: skip
    assert kinds["optimizer"]["ms"] == 0.0
    assert kinds["copies and sums"]["ratio"] is None
    assert [kernel["ms"] for kernel in data["kernels"]] == [6.0, 3.0, 1.0]


def test_the_floor_is_that_of_the_roofline_and_the_optimizer() -> None:
    ceilings = Ceilings("a GPU", 788.0, 4.3)
    options = _training.Options(batch_size=2, block_size=64)
    config = GPTConfig(block_size=64, vocab_size=96, n_layer=2, n_head=2, n_embd=32)
    kinds = _profile.floor_by_kind(config, options, ceilings)
    n_parameters = sum(p.numel() for p in GPT(config).parameters())
    assert kinds["optimizer"] == pytest.approx(28 * n_parameters / 4.3e9)
    rows = floor(config, 2, 64, ceilings)
    assert sum(kinds.values()) == pytest.approx(sum(r.ms for r in rows) + kinds["optimizer"])


def test_every_kernel_of_ours_is_of_a_kind() -> None:
    names = {
        node.name
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    kinds = {name: _profile.kind_of_kernel(name) for name in names}
    assert not {name for name, kind in kinds.items() if kind == "copies and sums"}
    assert kinds["_linear_gelu_kernel"] == "matrix products"
    assert kinds["_attention_bwd_dq_kernel"] == "attention"
    assert kinds["_cross_entropy_rows_kernel"] == "loss"
    assert kinds["_weight_grad_kernel"] == "matrix products"


# -- determinism, compute-sanitizer


@pytest.fixture
def on_cpu() -> Iterator[None]:
    if torch.cuda.is_available():
        pytest.skip("on a GPU the kernels would be compiled; the stage itself is for that")
    yield


@pytest.mark.usefixtures("on_cpu")
def test_every_op_is_run_and_found_deterministic(tmp_path: Path) -> None:
    sizes = {name: {k: min(v, 32) for k, v in one.items()}
             for name, one in _determinism.SMALL_SIZES.items()}  # fmt: skip
    assert _determinism.determinism(tmp_path, repeats=2, sizes=sizes) == 0
    data = read_json(tmp_path / "determinism.json")
    assert list(data) == list(_determinism.SMALL_SIZES)
    assert all(one["repeats"] == 2 and one["different"] == 0 for one in data.values())


@pytest.mark.usefixtures("on_cpu")
def test_an_op_that_fails_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(x: Any) -> Any:
        raise RuntimeError("broken kernel\nand more")

    gelu = _determinism.BENCHMARKS["gelu"]
    faulty = replace(gelu)
    object.__setattr__(faulty, "function", lambda provider: broken)
    monkeypatch.setattr(_determinism, "BENCHMARKS", {"faulty": faulty, "gelu": gelu})
    sizes = {name: {"M": 3, "N": 4} for name in ("faulty", "gelu")}
    assert _determinism.determinism(tmp_path, repeats=2, sizes=sizes) == 1
    found = read_json(tmp_path / "determinism.json")
    assert found["faulty"]["different"] == "RuntimeError: broken kernel"
    assert found["gelu"]["different"] == 0 and "and more" in capsys.readouterr().err
    assert "| faulty | 0 | RuntimeError: broken kernel |" in _visit_report._determinism(found)


@pytest.mark.usefixtures("on_cpu")
def test_an_op_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = _determinism.BENCHMARKS["gelu"]
    noisy = replace(op)
    object.__setattr__(noisy, "function", lambda provider: lambda x: x * torch.rand(()))
    monkeypatch.setattr(_determinism, "BENCHMARKS", {"gelu": noisy})
    sizes = {"gelu": {"M": 3, "N": 4}}
    assert _determinism.determinism(tmp_path, repeats=5, sizes=sizes) == 1
    assert read_json(tmp_path / "determinism.json")["gelu"]["different"] == 4


@pytest.mark.usefixtures("on_cpu")
def test_small_shapes_run(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {name: {k: min(v, 65) for k, v in one.items()}
             for name, one in _determinism.SMALL_SIZES.items()}  # fmt: skip
    assert _determinism.small(sizes) == 0
    assert capsys.readouterr().out.split() == [
        word for name in _determinism.SMALL_SIZES for word in ("op:", name)
    ]


def test_what_compute_sanitizer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        '#!/bin/sh\nwhile [ "$1" != --log-file ]; do shift; done; log=$2\n'
        "echo 'op: gelu'\n"
        "printf '========= Invalid __global__ write\\n========= ERROR SUMMARY: 1 error\\n' > $log\n"
        "exit 9\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    command = functools.partial(_stages.sanitizer_command, tool="memcheck")
    record = records(Stage("memcheck", command, _stages.sanitizer, 1.0, 0.0))["memcheck"]
    assert (record["status"], record["why"]) == ("failed", "exit code 9")
    assert record["data"]["summary"] == "1 error" and record["data"]["ops"] == ["gelu"]
    assert "Invalid __global__ write" in record["data"]["log"][0]


# -- Markdown


def test_a_summary_shows_what_was_found(parity: dict[str, Any]) -> None:
    row = {"op": "gelu", "shape": "M1-N2", "direction": "forward", "provider": "fused", "ms": 0.5,
           "gb_per_s": 3870.0, "tflop_per_s": None, "share_of_ceiling": 0.9}  # fmt: skip
    kinds = _profile.by_kind(
        [{"name": "_attention_fwd_kernel", "calls": 12.0, "ms": 6.0}], {"attention": 4.0}
    )
    variants = {"fastgpt": {"step_ms": 50.0} | kinds}
    profile = {"batch_size": 32, "block_size": 1024, "variants": variants}
    line = {"measured": {"line": '("fwd", 64): (64, 64, 4, 2),'}, "comment": "# 0.1 ms"}
    data = {
        "ops": {"rows": [row], "failures": []},
        "profile": profile,
        "sweep": [line, {"measured": None}],
        "determinism": {"gelu": {"repeats": 250, "different": 0}},
        "racecheck": {"summary": "0 hazards", "ops": ["gelu"], "log": ["=== done"]},
    }
    stages = [{"name": name, "status": "done", "why": None, "data": one}
              for name, one in data.items()]  # fmt: skip
    ceilings = {"before": CEILINGS, "after": None}
    record = {"created": "now", "machine": FACTS, "ceilings": ceilings, "stages": [parity, *stages]}
    text = markdown(record, {})
    for part in (
        "| toy bfloat16 | 1 | 0 | 0 |",
        "off by one",
        "| gelu | M1-N2 | forward | fused | 0.5 | 3870 | - | 90% |",
        "50.00 ms a step, no kernel running in 44.00 of them",
        "| attention | 6.00 | 100% | 4.00 | 1.50 |",
        '# 0.1 ms\n("fwd", 64): (64, 64, 4, 2),',
        "| gelu | 250 | 0 |",
        "0 hazards; ops: gelu",
    ):
        assert part in text, part
