"""A tuner run on a small model with a clock set by the test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import GPTConfig
from fastgpt.kernels import candidates, configs, fused
from fastgpt.kernels.configs import Key
from fastgpt.tuning import Table, Workload, tune, tuner
from fastgpt.tuning.phase import Phase
from fastgpt.tuning.table import choices

CPU = torch.device("cpu")
WORK = Workload(GPTConfig(block_size=8, vocab_size=16, n_layer=3, n_head=1, n_embd=16), 1)


def on_no_gpu(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Tune as if on an sm_90, with a clock that gives every launch the same time."""
    monkeypatch.setenv("FASTGPT_TUNED", str(folder))
    monkeypatch.setattr(configs, "_TUNED", {None: {}})
    monkeypatch.setattr(tuner, "ROUNDS", 1)
    monkeypatch.setattr(tuner, "Occupier", lambda device: lambda: None)
    monkeypatch.setattr(tuner, "milliseconds", lambda work, device: 1.0)


def trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the check of candidates' results."""
    monkeypatch.setattr(Phase, "expected", lambda phase: None)
    monkeypatch.setattr(Phase, "check", lambda phase, expected: None)


def clock(monkeypatch: pytest.MonkeyPatch, cost: Callable[[Key, Any], float]) -> list[Key]:
    """Let a launch take the sum of the costs of all current entries; return the keys timed."""
    timed: list[Key] = []

    def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
        work()
        lines = configs.tuned(device)
        timed.extend(list(lines)[-1:])
        return 1.0 + sum(cost(key, config) for key, config in lines.items())

    monkeypatch.setattr(tuner, "milliseconds", milliseconds)
    return timed


def number(key: Key, config: Any) -> int:
    """Index of the configuration among the candidates; 0 is the table's own."""
    found = choices(key, CPU)
    return next(n for n, one in enumerate(found) if candidates.same(one, config))


def last(key: Key, config: Any) -> float:
    """A cost function that makes the last candidate the fastest."""
    return 10.0 * (8 - number(key, config))


def run(work: Workload = WORK, **options: Any) -> tuple[Table, int]:
    return tune(work, CPU, **{"ops": fused, **options})


def only(monkeypatch: pytest.MonkeyPatch, *keys: Key) -> None:
    """Leave all entries except ``keys`` without candidates."""
    monkeypatch.setattr(
        "fastgpt.tuning.table.candidates",
        lambda *asked, of=candidates.candidates: (
            of(*asked) if (asked[0], asked[1]) in {key[:2] for key in keys} else of(*asked)[:1]
        ),
    )
