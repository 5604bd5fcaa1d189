"""bench/gpu_report.py: its time, stages that crash, hang or lack a library, what lies on disk when
it is cut off, and what the stages find, at sizes for a CPU.
"""

import ast
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _stages
import _training
import _visit
import gpu_report
import pytest
import run as bench_run
import torch
from _ceilings import Ceilings, floor
from _visit import Stage, budget, python, read_json, visit
from _visit_report import markdown

from fastgpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
FACTS = {
    "device": "cuda",
    "gpu": "NVIDIA H200",
    "commit": None,
    "uncommitted_changes": None,
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
    "cudnn": 91300,
    "python": "3.12.3",
}
CEILINGS = {"matmul_tflops": 788.0, "matmul": "8192", "copy_tb_per_s": 4.3, "copy": "2 GiB"}


def json_of(folder: Path) -> Any:
    return read_json(folder / "found.json")


def stage(name: str, code: str, **fields: Any) -> Stage:
    """A program that runs ``code``; what it finds goes into found.json in ``folder``."""
    before = (
        "import json, os, sys, time\nfrom pathlib import Path\n"
        "def found(x): (Path(sys.argv[1]) / 'found.json').write_text(json.dumps(x))\n"
    )
    options: dict[str, Any] = {"weight": 1.0, "least_s": 0.0, "collect": json_of} | fields
    return Stage(
        name=name,
        command=lambda folder, seconds: python("-c", before + code, folder, seconds),
        **options,
    )


MACHINE = stage("machine", f"found({{'facts': {FACTS!r}, 'ceilings': {CEILINGS!r}}})")


def records(*stages: Stage, seconds: float = 60.0) -> dict[str, dict[str, Any]]:
    """Of a visit: the last record of each stage."""
    out: dict[str, dict[str, Any]] = {}

    def report(record: dict[str, Any]) -> bool:
        json.dumps(record, allow_nan=False)
        out[record["name"]] = record
        return True

    visit(stages, seconds, report, lambda stage, limit: None)
    return out


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# -- time


def test_time_that_was_not_used_goes_to_the_stages_that_follow() -> None:
    a, b, c = (replace(MACHINE, name=n, weight=w) for n, w in (("a", 1), ("b", 2), ("c", 1)))
    assert budget([a, b, c], 100.0) == (25.0, 25.0)
    assert budget([b, c], 90.0) == (60.0, 60.0)  # a took 10 of its 25
    assert budget([replace(b, patience=1.25), c], 90.0) == (60.0, 75.0)
    assert budget([replace(b, patience=2.0), c], 90.0) == (60.0, 90.0)
    assert budget([replace(a, least_s=40.0), b], 60.0) == (40.0, 40.0)  # worth more: goes first
    assert budget([replace(a, least_s=40.0), b], 30.0) == (30.0, 30.0)


def test_the_plan_of_ten_minutes_leaves_time_for_every_stage() -> None:
    left, stages = 600.0, [s for s in _stages.plan((), 4, True) if s.skip is None]
    for number, one in enumerate(stages):
        plan, limit = budget(stages[number:], left)
        assert plan >= one.least_s, one.name
        left -= plan
    assert left >= 0.0
    assert [one.name for one in stages] == [
        *("machine", "parity", "ops", "run-b32", "run-b64", "run-b4", "profile", "determinism"),
        *("memcheck", "racecheck", "machine-after"),
    ]


# -- stages that do not end well


def test_a_stage_that_fails_costs_itself_alone() -> None:
    out = records(
        stage("good", "found({'x': 1})"),
        stage("exits", "found([1]); print('the reason'); sys.exit(3)"),
        stage("crashes", "os.kill(os.getpid(), 11)"),
        stage("library", "import nothing_of_this_name"),
        stage("skipped", "1 / 0", skip="no program"),
        stage("long", "1 / 0", least_s=1e3),
        stage("last", "found(sys.argv[2])"),
    )
    assert out["good"]["status"] == "done" and out["good"]["data"] == {"x": 1}
    assert out["good"]["why"] is None and "output" not in out["good"]
    assert (out["exits"]["status"], out["exits"]["why"]) == ("failed", "exit code 3")
    assert out["exits"]["data"] == [1] and out["exits"]["output"] == ["the reason"]
    assert (out["crashes"]["status"], out["crashes"]["why"]) == ("failed", "killed by SIGSEGV")
    library = out["library"]
    assert (library["status"], library["why"]) == ("not run", "needs nothing_of_this_name")
    assert (out["skipped"]["status"], out["skipped"]["why"]) == ("not run", "no program")
    assert out["long"]["status"] == "not run" and "it needs 1000" in out["long"]["why"]
    assert 50.0 < float(out["last"]["data"]) <= 60.0


def test_a_stage_that_hangs_is_ended_with_all_its_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_visit, "_GRACE_S", 0.1)
    code = """
import signal, subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
found({"parent": os.getpid(), "child": child.pid})
time.sleep(600)
"""
    out = records(stage("hangs", code), stage("next", "found(1)", least_s=0.5), seconds=2.0)
    assert out["hangs"]["status"] == "timed out"
    pids = out["hangs"]["data"]
    wait_until(lambda: not alive(pids["parent"]) and not alive(pids["child"]))
    assert out["next"]["data"] == 1


def test_what_a_running_stage_has_found_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_visit, "_LOOK_S", 0.05)
    seen = []

    def report(record: dict[str, Any]) -> bool:
        seen.append((record["status"], record["data"]))
        return True

    visit([stage("slow", "found(7); time.sleep(0.6)")], 20.0, report, lambda stage, limit: None)
    assert ("running", 7) in seen and seen[-1] == ("done", 7)


# -- the report


def reported(folder: Path, *stages: Stage, arguments: tuple[str, ...] = ()) -> dict[str, Any]:
    assert gpu_report.main([f"--out={folder}", "--minutes=1", *arguments], [MACHINE, *stages]) == 0
    record: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return record


def test_everything_lies_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = {"machine": dict(FACTS), "variants": {}, "options": {"batch_size": 4, "block_size": 8,
           "loss_steps": 2}, "dtype": "bfloat16", "baseline": None, "noise": None,
           "notes": ["short run"]}  # fmt: skip
    again = replace(MACHINE, name="machine-after")
    record = reported(
        tmp_path,
        stage("run-b4", f"found({run!r})"),
        stage("breaks", "print('because'); 1 / 0"),
        again,
        arguments=("--commit=abc",),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("report.json", "report.md", "run-b4.json"),
    ]
    assert record["machine"] == FACTS | {"commit": "abc"}
    assert record["ceilings"] == {"before": CEILINGS, "after": CEILINGS}
    statuses = {one["name"]: one["status"] for one in record["stages"]}
    assert statuses == {"machine": "done", "run-b4": "done", "breaks": "failed",
                        "machine-after": "done"}  # fmt: skip
    assert json.loads((tmp_path / "run-b4.json").read_text())["machine"]["commit"] == "abc"
    text = (tmp_path / "report.md").read_text()
    for part in ("# NVIDIA H200", "commit abc", "788 TFLOP/s", "| breaks | failed |", "because",
                 "short run"):  # fmt: skip
        assert part in text, part
    assert "breaks: failed: exit code 1" in capsys.readouterr().out


def test_chosen_stages_come_with_the_machine(tmp_path: Path) -> None:
    stages = stage("a", "found(1)"), stage("b", "found(2)")
    record = reported(tmp_path, *stages, arguments=("--stages", "b"))
    assert [one["name"] for one in record["stages"]] == ["machine", "b"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_cut_off_in_the_middle(number: signal.Signals, tmp_path: Path) -> None:
    """Nothing that was found is lost; but for SIGKILL, nothing goes on running."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nimport _visit, gpu_report, test_gpu_report as t\n_visit._LOOK_S = 0.05\n"
        "slow = t.stage('slow', 'found(os.getpid()); time.sleep(60)')\n"
        "gpu_report.main(sys.argv[1:], [t.MACHINE, t.stage('a', 'found(1)'), slow,"
        " t.stage('never', 'found(2)')])\n"
    )
    path = os.pathsep.join(str(ROOT / name) for name in ("", "bench", "tests"))
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, program, f"--out={out}"], env={**os.environ, "PYTHONPATH": path}
    )

    def record() -> dict[str, Any]:
        return read_json(out / "report.json") or {"stages": []}

    def data() -> dict[str, Any]:
        return {one["name"]: one["data"] for one in record()["stages"]}

    wait_until(lambda: data().get("slow") is not None, 60.0)
    process.send_signal(number)
    process.wait(20.0)
    pid = data()["slow"]
    if number == signal.SIGKILL:
        os.killpg(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid))
    assert data() == {"machine": None, "a": 1, "slow": pid}
    last = record()["stages"][-1]["status"]
    assert last == ("running" if number == signal.SIGKILL else "interrupted")
    assert "| slow |" in (out / "report.md").read_text()


def test_without_a_gpu_it_ends_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = tmp_path / "out"
    assert gpu_report.main([f"--out={out}", "--minutes=2"]) == 2
    assert "this needs a CUDA GPU" in capsys.readouterr().err
    assert [one["name"] for one in read_json(out / "report.json")["stages"]] == ["machine"]


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert gpu_report.main([f"--out={tmp_path}"]) == 2
    assert gpu_report.main([f"--keep={tmp_path / 'none'}"]) == 2
    for wrong in ("--minutes=0", "--sweep=softmax", "--stages=nothing"):
        with pytest.raises(SystemExit, match="2"):
            gpu_report.main([wrong])
    printed = capsys.readouterr().err
    for part in ("folder without a report", "folder with report.json", "must be positive, got 0",
                 "choose from", "invalid choice: 'nothing'"):  # fmt: skip
        assert part in printed, part


def test_it_loads_neither_torch_nor_what_may_be_missing() -> None:
    code = "import sys, gpu_report; print(sorted({'torch', 'triton', 'tyro'} & set(sys.modules)))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.stdout.decode().strip() == "[]", run.stderr.decode()


def test_the_ops_that_can_be_swept_are_those_of_the_sweep() -> None:
    import _sweep

    assert set(gpu_report._SWEEPS) == set(_sweep.OPS)


# -- the last good report


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "report"
    folder.mkdir()
    parity = {"name": "parity", "status": "done", "data": {"failed": 0, "passed": 9}}
    record = {"machine": FACTS | {"commit": "abc"}, "stages": [parity]}
    (folder / "report.json").write_text(json.dumps(record))
    (folder / "report.md").write_text("# report\n")
    for run in gpu_report.RUNS:
        (folder / f"{run}.json").write_text("{}")
    return folder


def test_a_good_report_is_kept(good: Path, tmp_path: Path) -> None:
    home = gpu_report.keep(good, tmp_path / "results")
    assert home == tmp_path / "results" / "nvidia-h200"
    assert {p.name for p in home.iterdir()} == {p.name for p in good.iterdir()}
    (good / "report.md").write_text("# newer\n")
    gpu_report.keep(good, tmp_path / "results")
    assert (home / "report.md").read_text() == "# newer\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["machine"].pop("gpu"), "it names no GPU"),
        (lambda r: r["machine"].update(commit=None), "it names no commit"),
        (lambda r: r["stages"].clear(), "parity: not run"),
        (lambda r: r["stages"][0].update(status="timed out"), "parity: timed out"),
        (lambda r: r["stages"][0]["data"].update(failed=2), "parity: 2 failed, 9 passed"),
        (lambda r: r["stages"][0]["data"].update(passed=0), "parity: 0 failed, 0 passed"),
        (None, "run-b64.json is missing"),
    ],
)
def test_another_is_not(change: Any, reason: str, good: Path, tmp_path: Path) -> None:
    if change is None:
        (good / "run-b64.json").unlink()
    else:
        record = read_json(good / "report.json")
        change(record)
        (good / "report.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=reason):
        gpu_report.keep(good, tmp_path / "results")
    assert not (tmp_path / "results").exists()


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
    losses = {"--loss_steps=200"} if batch_size == 4 else set()
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
    assert _stages.profile(tmp_path, 10.0, options) == 0
    found = read_json(tmp_path / "profile.json")
    assert list(found["variants"]) == ["fastgpt_train", "fastgpt"]
    for data in found["variants"].values():
        kinds = data["kinds"]
        assert data["step_ms"] > 0 and data["kernels"]
        assert sum(kind["share"] for kind in kinds) == pytest.approx(1.0)
        assert sum(kind["ms"] for kind in kinds) == pytest.approx(data["kernels_ms"])
        assert {"attention", "matrix products", "optimizer"} <= {kind["kind"] for kind in kinds}


def test_shares_and_ratios_by_hand() -> None:
    kernels = [
        {"name": "nvjet_tst_128x128", "calls": 2.0, "ms": 6.0},
        {"name": "_attention_fwd_kernel", "calls": 1.0, "ms": 3.0},
        {"name": "Memcpy HtoD", "calls": 1.0, "ms": 1.0},
    ]
    data = _stages.by_kind(kernels, {"matrix products": 4.0, "attention": 2.0, "optimizer": 1.0})
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
    kinds = _stages.floor_by_kind(config, options, ceilings)
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
    kinds = {name: _stages.kind_of_kernel(name) for name in names}
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
             for name, one in _stages.SMALL_SIZES.items()}  # fmt: skip
    assert _stages.determinism(tmp_path, 60.0, repeats=2, sizes=sizes) == 0
    data = read_json(tmp_path / "determinism.json")
    assert list(data) == list(_stages.SMALL_SIZES)
    assert all(one["repeats"] == 2 and one["different"] == 0 for one in data.values())


@pytest.mark.usefixtures("on_cpu")
def test_an_op_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = _stages._benchmarks()["gelu"]
    noisy = replace(op)
    object.__setattr__(noisy, "function", lambda provider: lambda x: x * torch.rand(()))
    monkeypatch.setattr(_stages, "_benchmarks", lambda: {"gelu": noisy})
    sizes = {"gelu": {"M": 3, "N": 4}}
    assert _stages.determinism(tmp_path, 60.0, repeats=5, sizes=sizes) == 1
    assert read_json(tmp_path / "determinism.json")["gelu"]["different"] == 4


@pytest.mark.usefixtures("on_cpu")
def test_small_shapes_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {name: {k: min(v, 65) for k, v in one.items()}
             for name, one in _stages.SMALL_SIZES.items()}  # fmt: skip
    assert _stages.small(tmp_path, 60.0, sizes) == 0
    assert capsys.readouterr().out.split() == [
        word for name in _stages.SMALL_SIZES for word in ("op:", name)
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
    kinds = _stages.by_kind(
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
