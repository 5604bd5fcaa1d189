"""The benchmarks on the pretended device at toy sizes, kernels filled: their times mean nothing,
that they run through does. Started by ``test_on_pretended_device.py``.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import bench_adamw, bench_decode, bench_fp8, sweep
from bench import run as run_py
from bench._harness import machine
from bench._ops import determinism, op_bench, product_bench
from bench._ops.op_bench import Row, Subject
from bench._step import profile as step_profile
from bench._step.variants import VARIANTS, Options
from bench._sweep import contest
from bench._sweep.compile import Static, lines
from tests.bench.test_bench_ops import OPS, PRODUCTS, TINY

CPU = ProfilerActivity.CPU
SMALL = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2"]
STEPS = ["--loss_steps=5", "--warmup=3", "--rounds=2", "--steps=2"]

# That differ from others by what torch.compile is asked for, or in nothing.
LEFT_OUT = ("sdpa_autotune", "sdpa_compile", "fastgpt_compile", "fastgpt_again")

FP8_SIZES = {
    "linear": {"M": 32, "K": 32, "N": 48},
    "linear_cross_entropy": {"M": 16, "C": 32, "V": 64},
}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rounds over little memory, for the machine's ceilings, too; no code of a compiler, and
    of the profiler what it knows of the host."""
    monkeypatch.setattr(op_bench, "_ROUNDS", 2)
    monkeypatch.setattr(op_bench, "_WARMUP_ROUNDS", 1)
    monkeypatch.setattr(op_bench, "_SCRATCH_BYTES", 1 << 12)
    randn, randint, compiled = torch.randn, torch.randint, torch.compile

    def small_randn(*size: int, **options: Any) -> Tensor:
        return randn(*(min(n, 64) for n in size), **options) if len(size) > 1 else randn(*size)

    def small_randint(high: int, size: Any, **options: Any) -> Tensor:
        return randint(high, tuple(min(n, 4096) for n in size), **options)

    ceilings = machine.ceilings

    def small_ceilings(device: torch.device) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", small_randn)
            patch.setattr(torch, "randint", small_randint)
            return ceilings(device)

    monkeypatch.setattr(machine, "ceilings", small_ceilings)

    @functools.wraps(compiled)
    def traced(*args: Any, mode: Any = None, **options: Any) -> Any:
        return compiled(*args, **options, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    for module, name in ((machine, "profile"), (step_profile, "profiler")):
        monkeypatch.setattr(module, name, lambda activities: profile(activities=[CPU]))
    op_bench.machine_ceilings.cache_clear()
    op_bench._scratch.cache_clear()
    Subject.of.cache_clear()
    yield


class _Once:
    """In place of pytest's fixture, which measures once a test."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, timed: Any, setup: Any, rounds: int, warmup_rounds: int) -> None:
        for _ in range(rounds + warmup_rounds):
            args, kwargs = setup()
            timed(*args, **kwargs)


def run(row: Any, measure: Any = None) -> None:
    found: dict[str, Any] = {}
    (measure or type(row).measure)(row, _Once(), found.__setitem__)
    assert found["figures"]["ms"] > 0 and found["figures"]["share_of_ceiling"] > 0


@pytest.mark.parametrize("name", OPS)
def test_ops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert op_bench.why_not("fused") is None and op_bench.DTYPE == torch.bfloat16
    # A filled kernel computes nothing that could be right.
    deviations = Subject._deviations
    monkeypatch.setattr(Subject, "_deviations", lambda *a: [0.0 * x for x in deviations(*a)])
    for direction in OPS[name].directions:
        for provider in ("fused", "eager"):
            run(Row(OPS[name], tuple(TINY[name].items()), direction, provider))


@pytest.mark.parametrize("provider", ["fused", "eager"])
def test_adamw(provider: str) -> None:
    run(bench_adamw.Row((("N", 3000),), provider))


@pytest.mark.parametrize("op", [bench_fp8.LINEAR, bench_fp8.LOSS], ids=lambda op: op.name)
def test_fp8(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench_fp8.why_not() is None
    monkeypatch.setattr(bench_fp8, "check", lambda row, inputs: None)
    for direction in op.directions:
        for provider in ("fp8", "bf16"):
            row = Row(op, tuple(FP8_SIZES[op.name].items()), direction, provider)
            run(row, bench_fp8.measure)


def test_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for product in PRODUCTS:
        sizes = {key: min(n, 32) for key, n in product.gpu_sizes[0].items()}
        for way in product.ways:
            monkeypatch.setattr(product_bench, "check", lambda p, x, way=way: p.ways[way](*x))
            run(product_bench.Row(product, tuple(sizes.items()), way))


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [name for name in VARIANTS if name not in LEFT_OUT]
    out = tmp_path / "out"
    argv = [*SMALL, *STEPS, "--vocab_size=128", f"--out={out}", "--variants", *variants]
    assert run_py.main(argv) == 0
    record = json.loads((out / "run-b2.json").read_text())
    assert record["machine"]["gpu"] == "pretended device"
    results = record["variants"]
    assert {name for name, one in results.items() if not one.get("failure")} == set(variants)


def test_profile(tmp_path: Path) -> None:
    options = Options(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, vocab_size=128)
    assert step_profile.profile(tmp_path, options) == 0


def test_determinism(tmp_path: Path) -> None:
    sizes = {name: TINY[name] for name in determinism.BENCHMARKS}
    assert determinism.determinism(tmp_path, repeats=2, sizes=sizes) == 0
    assert determinism.small(sizes) == 0


def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "same_greedy_tokens", lambda *_: True)
    sizes = ["--n-layer=1", "--n-head=1", "--n-embd=16", "--block-size=32", "--vocab-size=64"]
    out = tmp_path / "decode.json"
    argv = [*sizes, "--prompt=4", "--new-tokens=20", "--device=cuda", f"--out={out}"]
    assert bench_decode.main(argv) == 0
    assert json.loads(out.read_text())["tokens_per_s"]["fastgpt"] > 0


def test_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling ahead of time is not part of it: every candidate counts as good."""
    monkeypatch.setattr(contest, "_FLUSH_BYTES", 1 << 12)
    line = lines("gelu", 90, torch.bfloat16)["gelu fwd"]
    short = dataclasses.replace(line, sizes=(line.probe,), candidates=line.candidates[:2])
    monkeypatch.setattr(sweep, "lines", lambda *_: {short.name: short})
    monkeypatch.setattr(sweep, "compile_all", lambda tasks, jobs: [Static(None) for _ in tasks])
    monkeypatch.setattr(sweep, "fitted", lambda line, tile, one: tile)
    out = tmp_path / "sweep.json"
    assert sweep.main(["gelu", f"--json={out}"]) == 0
    (record,) = json.loads(out.read_text())
    assert record["capability"] == 90 and record["measured"] is not None
    assert "pretended device" in record["comment"]
