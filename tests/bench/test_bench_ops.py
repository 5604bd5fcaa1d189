"""bench/bench_<op>.py: byte and FLOP counts, the parity check before timing, timing, complete runs;
and bench/_ops/determinism.py."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import (
    bench_adamw,
    bench_attention,
    bench_attention_decode,
    bench_embedding,
    bench_gelu,
    bench_layer_norm,
    bench_linear,
    bench_linear_cross_entropy,
    bench_mlp,
    bench_residual_layer_norm,
    conftest,
)
from bench._harness.timing import Spread
from bench._ops import determinism, op_bench, op_report
from bench._ops.op_bench import Case, Direction, Op, Row, Stopwatch, cost
from bench._roofline.ceilings import DEVICES, Ceilings
from fastgpt.kernels import reference
from tests.tools import fp8_cases  # noqa: F401  # PyTorch 2.11's fp8 products on the CPU

ROOT = Path(__file__).resolve().parents[2]

TINY: list[tuple[Op, dict[str, int]]] = [  # small enough for interpreted kernels
    (bench_attention.OP, {"B": 1, "T": 33, "H": 2, "D": 16}),
    (bench_attention.OP, {"B": 2, "T": 33, "H": 2, "D": 16, "L": 10}),
    (bench_attention_decode.OP, {"B": 2, "S": 70, "H": 2, "D": 16}),
    (bench_embedding.OP, {"B": 2, "T": 9, "C": 24, "V": 11}),
    (bench_gelu.OP, {"M": 5, "N": 24}),
    (bench_layer_norm.OP, {"M": 7, "C": 24}),
    (bench_linear.OP, {"M": 20, "K": 24, "N": 40}),
    (bench_linear_cross_entropy.OP, {"M": 12, "C": 24, "V": 65}),
    (bench_mlp.OP, {"M": 12, "C": 16}),
    (bench_residual_layer_norm.OP, {"M": 7, "C": 24}),
]
OPS = op_bench.every_op()
MATRIX_OPS = ("attention", "linear", "mlp")
LOSS = {"M": 16, "C": 24, "V": 64}
FP8_SIZES = {"M": 16, "C": 32, "V": 64}


def bf16(op: Op, direction: Direction, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes and FLOPs of the op in bfloat16."""
    op = op if op is bench_adamw.OP else replace(op, dtype=torch.bfloat16)
    total = cost(op, tuple(sizes.items()), direction, DEVICES["h200"])
    return total.bytes, total.flops


def case(op: Op, sizes: dict[str, int]) -> Case:
    return Case(op, tuple(sizes.items()))


def test_every_op_has_a_file() -> None:
    # attention_qkvpacked stands for attention
    assert {op.name for op in OPS} >= set(reference.OPS) - {"attention"}


# -- bytes and FLOPs


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_size_costs_something(op: Op) -> None:
    for sizes in (*op.gpu_sizes, *op.cpu_sizes):
        for direction in op.directions:
            nbytes, flops = bf16(op, direction, sizes)
            assert nbytes > 0
            assert (flops > 0) == op.name.startswith(MATRIX_OPS)


def test_costs_equal_a_hand_count() -> None:
    m, n, k = 48, 32, 16
    gelu, linear, loss = bench_gelu.OP, bench_linear.OP, bench_linear_cross_entropy.OP
    assert bf16(gelu, "forward", {"M": m, "N": n}) == (2 * 2 * m * n, 0)  # x, y
    assert bf16(gelu, "backward", {"M": m, "N": n}) == (2 * 3 * m * n, 0)  # x, dy, dx

    sizes = {"M": m, "K": k, "N": n}
    matrices = m * k + n * k + m * n
    assert bf16(linear, "forward", sizes) == (2 * (matrices + n), 2 * m * n * k)
    # dy and weight give dx; dy and x give the gradients of weight and bias, in one part
    backward = 2 * (2 * matrices + n)
    assert bf16(linear, "backward", sizes) == (backward, 4 * m * n * k)

    sizes = {"M": m, "C": k, "V": 65}
    assert bf16(loss, "inference", sizes)[1] == 2 * m * k * 65
    assert bf16(loss, "forward+backward", sizes)[1] == 6 * m * k * 65

    # q, k and v of the new token, the cache, the result, the positions for both kernels; then for
    # each part of 128 keys a maximum, a sum and a row, written and read in float32
    sizes = {"B": 3, "S": 256, "H": 2, "D": 16}
    nbytes = 2 * (3 * 3 * 32 + 2 * 3 * 256 * 32 + 3 * 32) + 2 * 8 * 3 + 2 * 4 * 3 * 2 * 2 * 18
    decode = bf16(bench_attention_decode.OP, "inference", sizes)
    assert decode == (nbytes, 4 * 3 * 2 * 256 * 16)

    # parameter, gradient and two moments read, three of them and the bfloat16 copy written
    assert bf16(bench_adamw.OP, "update", {"N": 100}) == (30 * 100, 0)


def test_attention_costs_equal_a_hand_count() -> None:
    """A backward counts as five products, although our kernels compute seven: the scores and the
    gradient of the probabilities twice."""
    product = 3 * 2 * 2 * (64 * 64 // 2) * 16  # below the diagonal only
    sizes = tuple({"B": 3, "T": 64, "H": 2, "D": 16}.items())
    ceilings = Ceilings("matrix products alone", 1.0, 1e9)
    by_request = replace(bench_attention.OP, dtype=torch.bfloat16)
    by_kernels = replace(by_request, flops=None)
    for op, direction, products in (
        (by_request, "forward", 2),
        (by_kernels, "forward", 2),
        (by_request, "backward", 5),
        (by_kernels, "backward", 7),
    ):
        total = cost(op, sizes, direction, ceilings)  # type: ignore[arg-type]
        assert total.flops == products * product
        assert total.ms == pytest.approx(products * product / 1e9)


def test_flops_of_attention_are_those_within_documents() -> None:
    """The bytes do not depend on the documents."""
    found = bench_attention.doc_start(
        2, 12, 5
    )  # the second sequence starts in the middle of a document
    assert found.tolist() == [[0] * 5 + [5] * 5 + [10] * 2, [0] * 3 + [3] * 5 + [8] * 4]
    assert found.dtype == torch.int32
    sizes = {"B": 1, "T": 12, "H": 2, "D": 16}
    pairs = 2 * 5 * 4 // 2 + 1  # documents of 5, 5 and 2 tokens, the diagonal left out
    directions: tuple[tuple[Direction, int], ...] = (("forward", 2), ("backward", 5))
    for direction, products in directions:
        nbytes, flops = bf16(bench_attention.OP, direction, {**sizes, "L": 5})
        one_document = bf16(bench_attention.OP, direction, sizes)
        assert flops == products * 2 * 2 * pairs * 16 < one_document[1]
        assert nbytes == one_document[0]


def test_fp8_products_count_at_twice_the_rate() -> None:
    fp8, bf16 = (
        cost(
            replace(op, dtype=torch.bfloat16),
            tuple({"M": 1024, "C": 768, "V": 2304}.items()),
            "inference",
            Ceilings("matrix products alone", 1.0, 1e9),
        )
        for op in (bench_linear_cross_entropy.FP8, bench_linear_cross_entropy.OP)
    )
    assert fp8.flops == bf16.flops == 2 * 1024 * 768 * 2304
    assert 2 * fp8.ms == pytest.approx(bf16.ms)


# -- the parity check


@pytest.mark.parametrize(("op", "sizes"), TINY, ids=[op.name for op, _ in TINY])
def test_the_check_passes_our_ops(op: Op, sizes: dict[str, int], device: str) -> None:
    if device != op_bench.DEVICE.type:
        pytest.skip(f"the benchmarks of this machine run on {op_bench.DEVICE.type}")
    at_size = case(op, sizes)
    for provider in {"fused", "torch_ops"} & set(op.providers):
        at_size.checked(provider)


@pytest.mark.parametrize(
    ("provider", "op", "sizes", "called"),
    [
        ("liger", bench_layer_norm.OP, {"M": 7, "C": 24}, "liger_layer_norm"),
        ("liger", bench_linear_cross_entropy.OP, LOSS, "liger_fused_linear_cross_entropy"),
        ("quack", bench_linear_cross_entropy.OP, LOSS, "chunked_linear_cross_entropy"),
        ("quack", bench_linear_cross_entropy.OP, LOSS | {"V": 65}, "linear_cross_entropy_func"),
    ],
)
def test_the_check_passes_packages(
    provider: str, op: Op, sizes: dict[str, int], called: str, packages: list[str]
) -> None:
    """Each package gets its arguments in its own form."""
    case(op, sizes).checked(provider)
    assert set(packages) == {called}


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda x: 1.001 * F.gelu(x), "result 0"),
        (lambda x: F.gelu(x) + (x - x.detach()), "result 1"),
        (lambda x: F.gelu(x) * torch.nan, "result 0"),
    ],
)
def test_the_check_refuses(wrong: Callable[[Tensor], Tensor], what: str) -> None:
    op = replace(bench_gelu.OP, providers={"eager": F.gelu, "mine": wrong})
    with pytest.raises(AssertionError, match=f"{what} errs by"):
        case(op, {"M": 5, "N": 24}).checked("mine")


def test_the_check_of_documents_refuses_a_causal_mask() -> None:
    def causal(qkv: Tensor, n_head: int, starts: Tensor) -> Tensor:
        return bench_attention.eager(qkv, n_head, None)

    op = bench_attention.OP
    op = replace(op, providers={**op.providers, "causal": causal})
    with pytest.raises(AssertionError, match="result 0 errs by"):
        case(op, TINY[1][1]).checked("causal")


@pytest.mark.parametrize(
    ("op", "whole", "sizes"),
    [
        (bench_attention.OP, bench_attention.of(reference), TINY[0][1]),
        (
            bench_linear_cross_entropy.OP,
            reference.linear_cross_entropy,
            {"M": 2500, "C": 4, "V": 7},
        ),
    ],
    ids=["attention", "loss"],
)
def test_plain_ops_in_slices_equal_the_whole(op: Op, whole: Any, sizes: dict[str, int]) -> None:
    providers = {**op.providers, "slices": op.reference}
    case(replace(op, providers=providers, reference=whole), sizes).checked("slices")


@pytest.mark.parametrize("provider", ["fused", "torch_ops", "eager"])
def test_adamw_is_checked(provider: str) -> None:
    op = bench_adamw.OP
    bench_adamw.check(provider, op.function(provider), ())
    with pytest.raises(AssertionError, match="not close"):
        bench_adamw.check(provider, lambda state: None, ())


@pytest.mark.parametrize(("provider", "other"), [("fp8", "half"), ("half", "fp8")])
def test_fp8_is_checked(provider: str, other: str) -> None:
    op = bench_linear_cross_entropy.FP8
    random = op_bench.RandomTensors(torch.device("cpu"), torch.bfloat16)
    inputs = op.inputs(random, **FP8_SIZES)
    bench_linear_cross_entropy.check_fp8(provider, op.function(provider), inputs)
    with pytest.raises(AssertionError, match="deviates by"):
        bench_linear_cross_entropy.check_fp8(provider, op.function(other), inputs)


# -- timing


def test_only_the_work_is_timed() -> None:
    stopwatch = Stopwatch()
    time.sleep(0.02)
    assert stopwatch.read() == 0.0
    for expected in (1, 2):
        stopwatch.time(lambda: time.sleep(0.01))
        assert len(stopwatch.ms) == expected
    assert stopwatch.read() == pytest.approx(sum(stopwatch.ms) / 1e3)
    assert min(stopwatch.ms) >= 10.0 or op_bench.DEVICE.type == "cuda"  # CUDA events skip the sleep


def test_backward_is_timed_without_the_forward() -> None:
    calls = []

    def function(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return F.gelu(x)

    x = torch.randn(3, requires_grad=True)
    work = op_bench.prepared("backward", function, (x,), [torch.ones(3)])
    assert calls == [True]
    (dx,) = work()
    assert calls == [True] and dx.shape == x.shape
    work = op_bench.prepared("inference", function, (x,), [])
    assert calls == [True] and not work().requires_grad
    assert calls == [True, False]


def test_figures_and_table() -> None:
    row = Row(bench_gelu.OP, (("M", 1000), ("N", 500)), "forward", "torch_ops")
    nbytes = 2 * 1000 * 500 * op_bench.DTYPE.itemsize
    figures = row.figures(Spread(2.0, 1.0, 4.0), Ceilings("a GPU", 500.0, 0.002))
    assert (figures["ms"], figures["ms_p10"], figures["ms_p90"]) == (2.0, 1.0, 4.0)
    assert figures["bytes"] == nbytes and figures["tflop_per_s"] is None
    assert figures["gb_per_s"] == pytest.approx(nbytes / 2e-3 / 1e9)
    assert figures["share_of_ceiling"] == pytest.approx(figures["gb_per_s"] / 2.0)
    assert (figures["op"], figures["shape"], figures["M"]) == ("gelu", "M1000-N500", 1000)
    eager = replace(row, provider="eager").figures(Spread(3.0, 3.0, 3.0), None)
    assert eager["share_of_ceiling"] is None
    (table,) = op_report.tables([figures, eager])
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["shape"] == ["M1000-N500", ""]  # not repeated in the second row
    assert columns["provider"] == ["torch_ops", "eager"] and columns["of ceiling"][1] == ""
    assert columns["over eager"] == ["1.50x", "1.00x"]


@pytest.mark.parametrize(
    "major, minor, reason",
    [(7, 0, "compute capability 7.5, and Some GPU has 7.0"), (7, 5, None), (8, 0, None)],
)
def test_a_gpu_below_the_kernels_has_pytorchs_ops(
    major: int, minor: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = SimpleNamespace(name="Some GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    monkeypatch.setattr(op_bench, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(op_bench, "_ON_GPU", True)
    for op in (bench_gelu.OP, bench_linear_cross_entropy.OP, bench_attention.OP):
        ours, torchs = (op_bench.why_not(op, name) for name in ("fused", "torch_ops"))
        assert (ours is None) == (torchs is not None)
        of_attention = op is bench_attention.OP and major < 8
        expected = "PyTorch runs this op" if of_attention else reason
        assert ours == expected or (expected is not None and expected in str(ours))


def test_side_by_side_with_other_tests_is_refused() -> None:
    config: Any = SimpleNamespace(getoption=lambda name, default: {"numprocesses": 2}[name])
    with pytest.raises(pytest.UsageError, match="pytest -n0 bench"):
        conftest.pytest_configure(config)


def test_run(tmp_path: Path) -> None:
    out = tmp_path / "gelu.json"
    selection = "forward and not compile and not M8192"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench/bench_gelu.py"]
    command += ["-n0", "-rs", "-k", selection, f"--benchmark-json={out}"]
    # Without this pytest-benchmark takes itself for an xdist worker of this test run.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "of ceiling" in run.stdout
    record: dict[str, Any] = json.loads(out.read_text())
    assert record["machine_info"]["torch"] == torch.__version__
    assert "node" not in record["machine_info"]  # no host name
    on_gpu = torch.cuda.is_available()
    providers = set()
    for benchmark in record["benchmarks"]:
        figures = benchmark["extra_info"]
        providers.add(figures["provider"])
        assert (figures["op"], figures["direction"]) == ("gelu", "forward")
        assert figures["ms"] == pytest.approx(1e3 * benchmark["stats"]["median"])
        assert figures["gb_per_s"] == pytest.approx(figures["bytes"] / figures["ms"] / 1e6)
        assert (figures["share_of_ceiling"] is not None) == on_gpu
    assert providers == {"fused" if on_gpu else "torch_ops", "eager"}
    if not on_gpu:
        assert "fused: the Triton kernels need a CUDA GPU" in run.stdout


# -- determinism


@pytest.mark.skipif(torch.cuda.is_available(), reason="its kernels would be compiled")
def test_determinism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Our ops repeat bit for bit; a random op is found; a failing op does not stop the others."""

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("broken kernel\nand more")

    def op(name: str, function: Callable[[Tensor], Tensor]) -> tuple[Op, dict[str, int]]:
        return replace(bench_gelu.OP, name=name, providers={"fused": function}), {"M": 3, "N": 4}

    cases = [(op, {k: min(v, 32) for k, v in s.items()}) for op, s in determinism.small_cases()]
    others = [op("broken", broken), op("noisy", lambda x: x * torch.rand(()))]
    assert determinism.determinism(tmp_path, repeats=3, cases=cases) == 0
    assert determinism.determinism(tmp_path, repeats=3, cases=[*others, *cases[:1]]) == 1
    assert "and more" in capsys.readouterr().err
    found = json.loads((tmp_path / "determinism.json").read_text())
    different = {name: one["different"] for name, one in found.items()}
    expected = {"broken": "RuntimeError: broken kernel", "noisy": 2, "attention_qkvpacked": 0}
    assert different == expected
    assert determinism.small(cases[:2]) == 0
    assert "op: attention_qkvpacked\nop: embedding\n" in capsys.readouterr().out
