"""Benchmarks and tuner on the pretended device at toy sizes, with filled kernels: checks only that
they complete, since times mean nothing. Started by ``test_on_pretended_device.py``.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import bench_adamw, bench_decode, bench_linear_cross_entropy
from bench import run as run_py
from bench._harness import machine
from bench._ops import determinism, op_bench
from bench._ops.op_bench import Case, Op, Row
from bench._step import profile as step_profile
from bench._step.variants import PACKAGES, VARIANTS, Options
from fastgpt import GPTConfig, timing
from fastgpt.kernels import configs
from fastgpt.tuning import Workload, tune, tuner
from fastgpt.tuning.phase import Phase
from tests.bench.test_bench_ops import FP8_SIZES, TINY
from tests.tools.small_runs import data_set

CPU = ProfilerActivity.CPU
SMALL = ["--n_layer=1", "--n_head=1", "--n_embd=16", "--block_size=16", "--batch_size=2"]
# Graphs are captured in the first round and replayed after other variants' turns.
STEPS = ["--loss_steps=5", "--warmup=3", "--rounds=2", "--steps=1"]

# Variants that differ from others only in torch.compile's options, in the update or not at all, and
# those that need another package.
LEFT_OUT = (
    *("sdpa_autotune", "sdpa_compile", "sdpa_flash", "sdpa_cudnn", "sdpa_chunked"),
    *("fastgpt_compile", "fastgpt_recompute", "fastgpt_again", "sdpa_liger"),
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few rounds on little memory, also for the machine's ceilings; torch.compile generates no
    code, and the profiler only sees the host."""
    monkeypatch.setattr(op_bench, "_ROUNDS", 2)
    monkeypatch.setattr(op_bench, "_WARMUP_ROUNDS", 1)
    monkeypatch.setattr(timing, "_SCRATCH_BYTES", {"cuda": 1 << 12})
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
    op_bench.occupier.cache_clear()
    op_bench.case_of.cache_clear()
    yield


class _Once:
    """Replaces pytest-benchmark's fixture, which can be used only once per test."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, timed: Any, setup: Any, rounds: int, warmup_rounds: int) -> None:
        for _ in range(rounds + warmup_rounds):
            args, kwargs = setup()
            timed(*args, **kwargs)


CASES = [
    *TINY,
    (bench_adamw.OP, {"N": 3000}),
    (bench_linear_cross_entropy.FP8, FP8_SIZES),
]


@pytest.mark.parametrize(("op", "sizes"), CASES, ids=[op.name for op, _ in CASES])
def test_ops(op: Op, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    providers = [name for name in op.providers if op_bench.why_not(op, name) is None]
    if torch.cuda.get_device_capability() < (8, 0):
        assert op_bench.DTYPE == torch.float16
        of_attention = op.name.startswith("attention_qkvpacked")
        assert ("fused" in providers, "torch_ops" in providers) == (
            "fused" in op.providers and not of_attention,
            of_attention,
        )
    else:
        assert op_bench.DTYPE == torch.bfloat16
        assert set(op.providers) - {"torch_ops", *PACKAGES} == set(providers)
    # Results of filled kernels cannot be checked.
    monkeypatch.setattr(Case, "checked", lambda self, provider: self._op.function(provider))
    for direction in op.directions:
        for provider in set(providers) - {"compile"}:
            found: dict[str, Any] = {}
            row = Row(op, tuple(sizes.items()), direction, provider)
            row.measure(_Once(), found.__setitem__)
            assert found["figures"]["ms"] > 0 and found["figures"]["share_of_ceiling"] > 0


def test_run(tmp_path: Path) -> None:
    variants = [name for name in VARIANTS if name not in LEFT_OUT]
    is_old = torch.cuda.get_device_capability() < (8, 0)
    if is_old:  # only the dtype differs there
        variants = ["fastgpt_train", "fastgpt"]
    out = tmp_path / "out"
    argv = [*SMALL, *STEPS, "--vocab_size=128", f"--data_dir={data_set(tmp_path)}"]
    assert run_py.main([*argv, f"--out={out}", "--variants", *variants]) == 0
    record = json.loads((out / "run-b2.json").read_text())
    assert record["machine"]["gpu"] == "pretended device"
    assert record["dtype"] == ("float16" if is_old else "bfloat16")
    results = record["variants"]
    assert {name for name, one in results.items() if not one.get("failure")} == set(variants)


def test_profile(tmp_path: Path) -> None:
    names = "fastgpt_train", "fastgpt"
    size = Options(n_layer=1, n_head=1, n_embd=16, block_size=16, batch_size=2, vocab_size=128)
    options = replace(size, variants=names)
    assert step_profile.profile(tmp_path, options) == 0


def test_determinism(tmp_path: Path) -> None:
    cases = [(op, sizes) for op, sizes in TINY if op.small is not None]
    assert determinism.determinism(tmp_path, repeats=2, cases=cases) == 0
    assert determinism.small(cases) == 0


def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode, "same_greedy_tokens", lambda *_: True)
    sizes = ["--n-layer=1", "--n-head=1", "--n-embd=16", "--block-size=32", "--vocab-size=64"]
    out = tmp_path / "decode.json"
    argv = [*sizes, "--prompt=4", "--new-tokens=20", "--device=cuda", f"--out={out}"]
    assert bench_decode.main(argv) == 0
    assert json.loads(out.read_text())["tokens_per_s"]["fastgpt"] > 0


def test_tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled and kernels are filled, so every candidate counts as correct."""
    monkeypatch.setattr(tuner, "compile_ahead", lambda calls: None)
    monkeypatch.setenv("FASTGPT_TUNED", str(tmp_path))
    monkeypatch.setattr(Phase, "check", lambda *_: None)
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=1, n_embd=16)
    device = torch.device("cuda")
    table, left = tune(Workload(config, batch_size=2), device)
    assert left == 0 and not table.rejected and ("gemm", "fwd") in {key[:2] for key in table.lines}
    assert all(line.ms > 0 for line in table.lines.values())
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("pretended-device-")
    device = torch.device("cuda", 0)
    in_use = configs.tuned(device)
    assert configs.read_tuned(device) == in_use == {k: v.config for k, v in table.lines.items()}
