"""bench/bench_<op>.py: what is counted and what is timed, the check before it, and a run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
)
from bench._harness.timing import Spread
from bench._ops import op_bench, op_report, product_bench
from bench._ops.op_bench import Direction, Op, Row, Stopwatch, Subject, cost
from bench._ops.op_report import ALONE, FUSED, SEPARATE, verdict
from bench._roofline.ceilings import DEVICES, Ceilings
from fastgpt.kernels import configs, reference

ROOT = Path(__file__).resolve().parents[2]
FILES: list[ModuleType] = [
    bench_attention,
    bench_attention_decode,
    bench_embedding,
    bench_gelu,
    bench_layer_norm,
    bench_linear,
    bench_linear_cross_entropy,
    bench_mlp,
    bench_residual_layer_norm,
]
OPS: dict[str, Op] = {file.OP.name: file.OP for file in FILES}
MATRIX_OPS = ("attention_decode", "attention_qkvpacked", "linear", "linear_cross_entropy", "mlp")

PRODUCTS = [
    *bench_linear.PRODUCTS,
    *bench_linear_cross_entropy.PRODUCTS,
    *bench_mlp.PRODUCTS,
]

TINY = {  # for interpreted kernels
    "attention_decode": {"B": 2, "S": 70, "H": 2, "D": 16},
    "attention_qkvpacked": {"B": 1, "T": 33, "H": 2, "D": 16},
    "embedding": {"B": 2, "T": 9, "C": 24, "V": 11},
    "gelu": {"M": 5, "N": 24},
    "layer_norm": {"M": 7, "C": 24},
    "linear": {"M": 20, "K": 24, "N": 40},
    "linear_cross_entropy": {"M": 12, "C": 24, "V": 65},
    "mlp": {"M": 12, "C": 16},
    "residual_layer_norm": {"M": 7, "C": 24},
}


def bf16(name: str, direction: Direction, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes and FLOPs."""
    total = cost(OPS[name], tuple(sizes.items()), direction, torch.bfloat16, DEVICES["h200"])
    return total.bytes, total.flops


def test_every_op_has_a_file() -> None:
    # measured as attention_qkvpacked; changes six tensors, with rows of its own
    assert set(OPS) == set(reference.OPS) - {"attention", "adamw"}
    names = {Path(str(file.__file__)).name for file in FILES}
    # a mode of ops that have their files (test_bench_fp8.py); an op with rows of its own; a whole
    # method
    special = {"bench_fp8.py", "bench_adamw.py", "bench_decode.py"}
    assert names | special == {path.name for path in (ROOT / "bench").glob("bench_*.py")}


@pytest.mark.parametrize("name", OPS)
def test_every_size_costs_something(name: str) -> None:
    op = OPS[name]
    for sizes in (*op.gpu_sizes, *op.cpu_sizes):
        for direction in op.directions:
            nbytes, flops = bf16(name, direction, sizes)
            assert nbytes > 0
            assert (flops > 0) == (name in MATRIX_OPS)


@pytest.mark.parametrize("provider", ["fused", "torch_ops", "eager"])
def test_adamw_is_checked_before_it_is_timed(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench_adamw.check(provider)
    monkeypatch.setattr(bench_adamw, "work", lambda state, provider: lambda: None)
    with pytest.raises(AssertionError, match="not close"):
        bench_adamw.check(provider)


def test_costs_equal_a_hand_count() -> None:
    m, n, k = 48, 32, 16
    assert bf16("gelu", "forward", {"M": m, "N": n}) == (2 * 2 * m * n, 0)  # x, y
    assert bf16("gelu", "backward", {"M": m, "N": n}) == (2 * 3 * m * n, 0)  # x, dy, dx

    sizes = {"M": m, "K": k, "N": n}
    matrices = m * k + n * k + m * n
    assert bf16("linear", "forward", sizes) == (2 * (matrices + n), 2 * m * n * k)
    # dy and weight make dx; dy and x make the gradients of weight and bias, the first of which is
    # summed in float32, written and read once more
    backward = 2 * (2 * matrices + n) + 2 * 4 * n * k
    assert bf16("linear", "backward", sizes) == (backward, 4 * m * n * k)

    sizes = {"M": m, "C": k, "V": 65}
    assert bf16("linear_cross_entropy", "inference", sizes)[1] == 2 * m * k * 65
    assert bf16("linear_cross_entropy", "forward+backward", sizes)[1] == 6 * m * k * 65

    # q, k and v of the new token, the cache, the result, the positions for both kernels; parts of
    # 128 keys, written and read in float32: a maximum, a sum, a row
    sizes = {"B": 3, "S": 256, "H": 2, "D": 16}
    nbytes = 2 * (3 * 3 * 32 + 2 * 3 * 256 * 32 + 3 * 32) + 2 * 8 * 3 + 2 * 4 * 3 * 2 * 2 * 18
    assert bf16("attention_decode", "inference", sizes) == (nbytes, 4 * 3 * 2 * 256 * 16)


def test_attention_costs_equal_a_hand_count() -> None:
    """A backward counts five products: the scores and the gradient of the probabilities, which our
    kernels compute twice, once."""
    under_the_diagonal = 64 * 64 // 2
    product = 3 * 2 * 2 * under_the_diagonal * 16
    sizes = tuple({"B": 3, "T": 64, "H": 2, "D": 16}.items())
    ceilings = Ceilings("matrix products alone", 1.0, 1e9)
    by_kernels = replace(OPS["attention_qkvpacked"], flops=None)
    for op, direction, products in (
        (OPS["attention_qkvpacked"], "forward", 2),
        (by_kernels, "forward", 2),
        (OPS["attention_qkvpacked"], "backward", 5),
        (by_kernels, "backward", 7),
    ):
        total = cost(op, sizes, direction, torch.bfloat16, ceilings)  # type: ignore[arg-type]
        assert total.flops == products * product
        assert total.ms == pytest.approx(products * product / 1e9)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("provider", ["fused", "torch_ops"])
def test_the_check_passes_our_ops(name: str, provider: str, device: str) -> None:
    if device != op_bench.DEVICE.type:
        pytest.skip(f"the benchmarks of this machine run on {op_bench.DEVICE.type}")
    subject = Subject(OPS[name], tuple(TINY[name].items()))
    subject.check(provider, OPS[name].function(provider))


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda x: 1.001 * F.gelu(x), "output 0"),
        (lambda x: F.gelu(x) + (x - x.detach()), "gradient 0"),
        (lambda x: F.gelu(x) * torch.nan, "output 0"),
    ],
)
def test_the_check_refuses(wrong: Callable[[Tensor], Tensor], what: str) -> None:
    subject = Subject(OPS["gelu"], (("M", 5), ("N", 24)))
    with pytest.raises(AssertionError, match=f"gelu by mine: {what} has an RMS error"):
        subject.check("mine", wrong)


def test_plain_ops_in_slices_equal_the_whole() -> None:
    for name in ("attention_qkvpacked", "linear_cross_entropy"):
        op = OPS[name]
        assert op.truth is not None
        whole = replace(op, truth=None)
        sizes = {"M": 2500, "C": 4, "V": 7} if name == "linear_cross_entropy" else TINY[name]
        Subject(whole, tuple(sizes.items())).check("truth", op.truth)


def test_only_the_work_is_timed() -> None:
    stopwatch = Stopwatch()
    time.sleep(0.02)
    assert stopwatch.read() == 0.0
    for expected in (1, 2):
        stopwatch.time(lambda: time.sleep(0.01))
        assert len(stopwatch.ms) == expected
    assert stopwatch.read() == pytest.approx(sum(stopwatch.ms) / 1e3)
    assert min(stopwatch.ms) >= 10.0 or op_bench.DEVICE.type == "cuda"  # which slept through it


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


def test_figures() -> None:
    row = Row(OPS["gelu"], (("M", 1000), ("N", 500)), "forward", "eager")
    nbytes = 2 * 1000 * 500 * op_bench.DTYPE.itemsize
    figures = row.figures(Spread(2.0, 1.0, 4.0), Ceilings("a GPU", 500.0, 0.002))
    assert (figures["ms"], figures["ms_p10"], figures["ms_p90"]) == (2.0, 1.0, 4.0)
    assert figures["bytes"] == nbytes and figures["tflop_per_s"] is None
    assert figures["gb_per_s"] == pytest.approx(nbytes / 2e-3 / 1e9)
    assert figures["share_of_ceiling"] == pytest.approx(figures["gb_per_s"] / 2.0)
    assert (figures["op"], figures["shape"], figures["M"]) == ("gelu", "M1000-N500", 1000)
    assert row.figures(Spread(2.0, 1.0, 4.0), None)["share_of_ceiling"] is None


def test_table_says_a_shape_once() -> None:
    ms = Spread(2.0, 1.0, 4.0)
    rows = [
        Row(OPS[name], tuple(TINY[name].items()), direction, provider).figures(ms, None)
        for name in ("gelu", "linear")
        for direction in OPS[name].directions
        for provider in ("torch_ops", "eager")
    ]
    gelu, linear = op_report.tables(rows)
    assert gelu.row_count == linear.row_count == 4
    columns = {str(column.header): list(column.cells) for column in linear.columns}
    assert columns["shape"] == ["M20-K24-N40", "", "M20-K24-N40", ""]
    assert columns["provider"] == ["torch_ops", "eager", "torch_ops", "eager"]
    assert all(columns["TFLOP/s"]) and columns["of ceiling"] == [""] * 4


# -- products with an epilogue against cuBLAS


def tiny_inputs(product: product_bench.Product) -> tuple[Tensor, ...]:
    return product_bench.drawn(product, tuple(TINY[product.op].items()))


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)
def test_the_ways_of_a_product_agree(product: product_bench.Product, device: str) -> None:
    if device != op_bench.DEVICE.type:
        pytest.skip(f"the benchmarks of this machine run on {op_bench.DEVICE.type}")
    inputs = tiny_inputs(product)
    results = product_bench.check(product, inputs)
    alone = product.ways[ALONE](*inputs)
    assert {x.shape for x in alone} <= {x.shape for x in results}


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)
def test_a_wrong_kernel_is_found(product: product_bench.Product) -> None:
    def wrong(*inputs: Tensor) -> tuple[Tensor, ...]:
        *right, last = product.ways[SEPARATE](*inputs)
        return *right, 1.01 * last

    ways = {SEPARATE: product.ways[SEPARATE], FUSED: wrong}
    number = len(product.ways[SEPARATE](*tiny_inputs(product))) - 1
    with pytest.raises(AssertionError, match=f"{product.op}, {product.name}: result {number} has"):
        product_bench.check(replace(product, ways=ways), tiny_inputs(product))


@pytest.mark.parametrize("product", PRODUCTS, ids=lambda product: product.name)
def test_flops_of_products(product: product_bench.Product) -> None:
    """As PyTorch counts them, of the way that multiplies and does nothing else."""
    with FlopCounterMode(display=False) as counter:
        product.ways[ALONE](*tiny_inputs(product))
    assert counter.get_total_flops() == product.flops(**TINY[product.op])


def test_a_table_that_says_cublas_has_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    product = bench_mlp.PRODUCTS[0]
    monkeypatch.setattr(product_bench, "DEVICE", torch.device("cuda", 0))
    monkeypatch.setattr(
        product_bench, "configured", lambda table: configs.Gemm(64, 64, 64, 4, 3, 1)
    )
    assert [product.why_not(way) for way in (ALONE, SEPARATE, FUSED)] == [None] * 3
    monkeypatch.setattr(product_bench, "configured", lambda table: configs.CUBLAS)
    assert product.why_not(SEPARATE) is None
    assert product.why_not(FUSED) == "the launch table says cuBLAS"


@pytest.mark.parametrize(
    ("ms", "text"), [(1.2, "0.80, keeps Triton"), (1.8, "1.20, cuBLAS stays")], ids=str
)
def test_the_table_says_who_is_faster(ms: float, text: str) -> None:
    times = {ALONE: 1.0, SEPARATE: 1.5, FUSED: ms}
    sizes = tuple({"M": 2**15, "C": 768}.items())
    rows = [
        product_bench.Row(product, sizes, way).figures(
            Spread(time, time, time), 2**20, Ceilings("a GPU", 500.0, 4.0)
        )
        for product in bench_mlp.PRODUCTS[:2]
        for way, time in times.items()
    ]
    (table,) = op_report.tables(rows)
    assert table.title == f"mlp products, {str(op_bench.DTYPE).removeprefix('torch.')}"
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["direction"] == ["FC, GELU", "", "", "FC2 dX, GELU'", "", ""]
    assert columns["of cuBLAS, then passes"] == ["", "", text] * 2
    rate = 500.0 if op_bench.DTYPE.itemsize == 2 else 250.0
    share = 2 * 2**15 * 768 * 4 * 768 / rate / 1e9 / ms
    assert columns["of ceiling"][2] == f"{share:.0%}"
    assert verdict(rows[:2]) == ""  # nothing to compare


def pytest_on_bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "bench/bench_gelu.py"]
    # pytest-benchmark would take itself for a worker of the run that this test is part of
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return subprocess.run([*command, *options], cwd=ROOT, env=env, capture_output=True, text=True)


def test_side_by_side_with_other_tests_is_refused() -> None:
    run = pytest_on_bench("-n2")
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "pytest -n0 bench" in run.stderr


def test_run(tmp_path: Path) -> None:
    """The smallest: one direction of GELU. torch.compile is in it."""
    out = tmp_path / "gelu.json"
    run = pytest_on_bench("-n0", "-rs", "-k", "forward", f"--benchmark-json={out}")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "of ceiling" in run.stdout
    record: dict[str, Any] = json.loads(out.read_text())
    assert record["machine_info"]["torch"] == torch.__version__
    assert "node" not in record["machine_info"]  # the name of the host
    on_gpu = torch.cuda.is_available()
    providers = set()
    for benchmark in record["benchmarks"]:
        figures = benchmark["extra_info"]
        providers.add(figures["provider"])
        assert (figures["op"], figures["direction"]) == ("gelu", "forward")
        assert figures["ms"] == pytest.approx(1e3 * benchmark["stats"]["median"])
        assert figures["gb_per_s"] == pytest.approx(figures["bytes"] / figures["ms"] / 1e6)
        assert (figures["share_of_ceiling"] is not None) == on_gpu
    assert {"fused" if on_gpu else "torch_ops", "eager"} <= providers
    if not on_gpu:
        assert "fused: the Triton kernels need a CUDA GPU" in run.stdout
