"""The tuner on interpreted kernels: calls of a model, choices by the clock."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.kernels import _host, candidates, configs, fused, fused_rows, torch_ops
from fastgpt.kernels.configs import CUBLAS, Key
from fastgpt.tuning import Table, Workload, exported, summary, tuner
from fastgpt.tuning.phase import Phase
from fastgpt.tuning.table import choices
from fastgpt.tuning.workload import _adamw, calls_of
from tests.tools import parity
from tests.tuning.small_tuning import CPU, WORK, clock, number, only, run

pytestmark = pytest.mark.usefixtures("measured")


# ------------------------------------------------------------------------------ measured calls


def test_the_calls_of_a_training_step() -> None:
    found = {str(call): count for call, count in calls_of(WORK, CPU, fused)}
    assert found == {
        "embedding (1, 8) (16, 16) (8, 16)": 1,
        "layer_norm (1, 8, 16)": 1,
        "linear (1, 8, 16) (48, 16)": 3,
        "attention_qkvpacked (1, 8, 48)": 3,
        "linear (1, 8, 16) (16, 16)": 3,
        "residual_layer_norm (1, 8, 16) (1, 8, 16)": 6,
        "mlp (1, 8, 16) (64, 16) (16, 64)": 3,
        "linear_cross_entropy (1, 8, 16) (16, 16) (1, 8)": 1,
        "adamw": 1,
    }


def test_a_model_with_all_options() -> None:
    shape = GPTConfig(
        block_size=8, vocab_size=16, n_layer=1, n_head=1, n_embd=16, dropout=0.2, bias=False
    )
    work = Workload(shape, 2, torch.float16, recompute=True, document_mask=True)
    calls = {call.op: call for call, _ in calls_of(work, CPU, fused)}
    attention, linear = calls["attention_qkvpacked"], calls["mlp"]
    assert attention.kwargs["dropout_p"] == 0.2 and attention.kwargs["doc_start"].shape == (2, 8)
    assert linear.kwargs["recompute"] is not None and linear.args[2] is None
    assert calls["linear"].args[1].dtype == torch.float32  # under autocast
    assert {call.dtype for call in calls.values()} == {torch.float16} and "adamw" not in calls
    left_out: list[str] = []
    table, left = run(work, show=left_out.append)
    options = {key.options for key in table.lines}
    assert left == 0 and not table.rejected and not left_out
    assert ("recompute",) in options and "recompute=True document_mask=True" in str(work)
    assert str(work) == table.workloads[0] != str(WORK)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_gpu_without_tritons_products(dropout: float) -> None:
    """Models there have no dropout seed, but the calls that the tuner compares do."""
    shape = GPTConfig(8, 16, n_layer=1, n_head=1, n_embd=16, dropout=dropout)
    work = Workload(shape, 2, torch.float16)
    left_out: list[str] = []
    with _host.interpreted(capability=75):
        table, left = run(work, ops=fused_rows, show=left_out.append)
        calls = calls_of(work, CPU, fused_rows)
    seeded = {call.op for call, _ in calls if call.kwargs.get("seed") is not None}
    assert seeded == ({"embedding", "residual_layer_norm"} if dropout else set())
    tuned = {key.op for key in table.lines}
    assert left == 0 and not table.rejected and not left_out
    assert {"embedding", "gelu", "layer_norm"} <= tuned and not {"attention", "gemm"} & tuned
    assert {key.arch for key in table.lines} == {"sm_75"}


GROUPS = sorted({(key.op, key.kernel) for key in candidates.CANDIDATES})


@functools.cache
def phases() -> list[Phase]:
    """All phases of a model with head size 64, which has the most candidates."""
    shape = GPTConfig(block_size=72, vocab_size=80, n_layer=1, n_head=1, n_embd=64)
    calls = calls_of(Workload(shape, 1), CPU, fused)
    both = [Phase(call, n, backward, fused) for call, n in calls for backward in (False, True)]
    return [phase for phase in both if phase.call.op != "adamw" or not phase.backward]


@functools.cache
def asked(lines: tuple[Key, ...]) -> list[list[Key]]:
    """The keys that each phase looks up if cuBLAS runs the products in ``lines``."""
    configs.tuned(CPU).update(dict.fromkeys(lines, CUBLAS))
    return [tuner.asked_by(phase) for phase in phases()]


def interpreted(config: Any) -> tuple[Any, ...]:
    """The fields that affect the interpreter: not warps, stages and registers."""
    unused = ("num_warps", "num_stages", "maxnreg")
    fields = config._asdict() if hasattr(config, "_asdict") else {"library": config}
    return type(config), *((name, fields[name]) for name in fields if name not in unused)


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_every_candidate_is_right(group: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates of all architectures and sizes pass the tuner's own check on odd sizes."""
    op, kernel = group
    every = {
        interpreted(one): one
        for key, found in candidates.CANDIDATES.items()
        if (key.op, key.kernel) == group
        for one in found
    }
    monkeypatch.setattr(
        tuner, "choices", lambda key, device: [choices(key, device)[0], *every.values()]
    )
    table = Table(CPU)
    deciding = tuner.Tuner(table, show=pytest.fail)
    products = [Key("gemm", name, "sm_90", "half", n) for name, n in (("fwd", 64), ("bwd", 256))]
    lines = tuple(products) if op == "gelu" else ()  # a separate kernel only after cuBLAS
    asking: dict[Key, list[Phase]] = {}
    for phase, keys in zip(phases(), asked(lines), strict=True):
        for key in keys:
            if key.op == op and kernel in (key.kernel, configs.ANY):
                asking.setdefault(key, []).append(phase)
    configs.tuned(CPU).update(dict.fromkeys(lines, CUBLAS))
    assert asking
    for key, at in asking.items():
        with parity.skipped_without_sdpa():
            line = deciding.decide(key, at[:1])
        assert line.n_tried == 1 + len(every)


@pytest.mark.parametrize("wrong_in", ["result 0", "result 1"])
def test_a_wrong_candidate_is_left_out_however_fast(
    wrong_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates with a wrong output or gradient, or that do not compile, are left out; the next
    run does not try them."""
    key = Key("layer_norm", "fwd", "sm_90", "half", 32)
    wrong, broken = configs.WholeRows(2, 4), configs.WholeRows(3, 4)
    monkeypatch.setitem(
        candidates.CANDIDATES, Key("layer_norm", "fwd"), (wrong, broken, configs.WholeRows(4, 4))
    )
    ops = ModuleType("ops")
    vars(ops).update(vars(fused))

    def layer_norm(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        y = fused.layer_norm(x, *args, **kwargs)
        if configs.tuned(CPU).get(key) != wrong:
            return y
        return y * 1.05 if wrong_in == "result 0" else y + 10.0 * (x - x.detach())

    ops.layer_norm = layer_norm  # type: ignore[attr-defined]
    only(monkeypatch, key)
    clock(monkeypatch, lambda key, config: 0.0 if config in (wrong, broken) else 1.0)
    for _ in range(2):
        shown: list[str] = []
        table, left = run(ops=ops, show=shown.append)
        assert left == 0 and table.lines[key].n_tried == 2
        assert table.lines[key].config == choices(key, CPU)[0]
        assert [config for _, config, _ in table.rejected] == [wrong, broken]
        first, second = shown
        assert first.startswith(f"layer_norm fwd 32: rejected {wrong}: AssertionError: ")
        assert f"{wrong_in} errs by" in first and "allowed are" in first
        assert second.startswith(f"layer_norm fwd 32: rejected {broken}: ")
        del table.lines[key]  # so that it is measured again
        table.write()
        monkeypatch.setattr(Phase, "check", lambda *_: None)


@pytest.mark.parametrize("share,right", [(1e-5, True), (1e-2, False)])
def test_a_rounding_that_falls_the_other_way(share: float, right: bool) -> None:
    """One of 100,000 weights may round the other way, as on an H200; one of 100 is an error."""
    size = 400_000
    call = _adamw(size, torch.bfloat16, CPU)
    flips = torch.arange(0, size, int(1 / share))
    ops = ModuleType("ops")

    def adamw(param: torch.Tensor, rounded: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch_ops.adamw(param, rounded, *args, **kwargs)
        rounded[flips] = (rounded[flips].float() * (1 + 2**-7)).bfloat16()

    ops.adamw = adamw  # type: ignore[attr-defined]
    phase = Phase(call, 1, False, ops)
    with nullcontext() if right else pytest.raises(AssertionError, match="result 1 errs by"):
        phase.check(phase.expected())


# ------------------------------------------------------------------------------ choices


def test_the_clock_decides(trusting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third entry keeps its configuration, the others get different candidates."""
    best: dict[Key, int] = {}

    def cost(key: Key, config: Any) -> float:
        n = len(choices(key, CPU))
        winner = best.setdefault(key, 0 if len(best) % 3 == 0 else 1 + len(best) % (n - 1))
        return 0.0 if number(key, config) == winner else 10.0 + number(key, config)

    clock(monkeypatch, cost)
    seen: list[float] = []
    table, left = run(progress=lambda fraction, text="": seen.append(fraction or 0.0))
    assert left == 0 and table.workloads == [str(WORK)] and len(best) >= 10
    for key, line in table.lines.items():
        assert number(key, line.config) == best[key]
        assert line.gain > 1.0 if best[key] else line.gain == 1.0
        assert line.noise == 1.0 and line.n_tried == len(choices(key, CPU))
    assert seen == sorted(seen) and seen[-1] < 1.0
    # in use, in the file, and as entries for the launch tables
    chosen = {key: line.config for key, line in table.lines.items()}
    assert configs.tuned(CPU) == chosen == configs.read_tuned(CPU)
    assert Table.read(CPU) == table
    changed = {key: config for key, config in chosen.items() if best[key]}
    assert [line.key for line in table.changes()] == list(changed)
    assert summary(table, 2).startswith(f"{len(chosen)} launches measured, {len(changed)} changed")
    pasted = eval("{" + "\n".join(exported(table)) + "\n}", dict(vars(configs)))
    assert pasted.keys() == changed.keys()
    assert all(candidates.same(pasted[key], config) for key, config in changed.items())


@pytest.mark.parametrize(
    ("again", "other", "best"),
    [
        (10.0, 9.0, 1),
        (10.0, 9.95, 0),  # gain below 1%
        (11.5, 9.0, 0),  # gain below the noise
        (8.7, 9.0, 0),
        (10.05, 9.0, 1),
        (10.0, 10.0, 0),
    ],
)
def test_who_wins(again: float, other: float, best: int) -> None:
    found, noise = tuner.verdict({-1: again, 0: 10.0, 1: other, 2: 12.0})
    assert found == best and noise >= 1.0


def test_passes_count_as_often_as_a_step_has_them(
    trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A candidate that is slower in the one plain LayerNorm but faster in six others wins."""
    key = Key("layer_norm", "fwd", "sm_90", "half", 32)
    only(monkeypatch, key)
    second = choices(key, CPU)[1]
    phases: list[Phase] = []
    prepared = Phase.prepared

    def noted(self: Phase) -> Callable[[], Any]:
        phases.append(self)
        return prepared(self)

    monkeypatch.setattr(Phase, "prepared", noted)

    def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
        trying = candidates.same(configs.tuned(device).get(key), second)
        plain = phases[-1].call.op == "layer_norm"
        return 10.0 + (trying and (5.0 if plain else -1.0))

    monkeypatch.setattr(tuner, "milliseconds", milliseconds)
    table, _ = run()
    assert table.lines[key].config == second
    assert table.lines[key].present_ms == 70.0 and table.lines[key].ms == 69.0


def test_a_choice_decides_which_kernels_are_left(
    trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GELU is a separate kernel only after cuBLAS; here the clock reverses sm_90's choices."""

    def cost(key: Key, config: Any) -> float:
        if key.op != "gemm":
            return 0.0
        return 1.0 if (config == CUBLAS) == (key.kernel == "fwd") else 0.0

    only(monkeypatch, Key("gemm", "fwd"), Key("gemm", "bwd"), Key("gelu", "bwd_rows"))
    clock(monkeypatch, cost)
    table, left = run()
    found = {key[:2] for key in table.lines}
    assert left == 0 and ("gelu", "bwd_rows") in found and ("gelu", "fwd") not in found
