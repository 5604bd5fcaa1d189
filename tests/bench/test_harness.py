"""The benchmark harness: timing, summaries of times, and facts about the machine."""

import pytest
import torch

from bench._harness import machine, timing
from fastgpt.timing import interleaved


def test_spread_and_rate() -> None:
    times = timing.spread([float(ms) for ms in range(100, 201)])
    assert times == timing.Spread(median=150.0, p10=110.0, p90=190.0)
    assert timing.rate(times, 300.0) == timing.Spread(2000.0, 3e5 / 190, 3e5 / 110)
    with pytest.raises(ValueError, match="at least one"):
        timing.spread([])


def test_every_round_has_every_variant_and_another_first() -> None:
    order = list(interleaved("abc", 4))
    assert "".join(item for _, item in order) == "abcbcacababc"
    assert [number for number, _ in order] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_what_nvidia_smi_says() -> None:
    output = "driver_version, clocks.current.sm [MHz], power.draw [W]\n575.1, 1980 MHz, 612.20 W\n"
    assert machine.parse_smi(output) == {
        "driver_version": "575.1",
        "clocks.current.sm": "1980 MHz",
        "power.draw": "612.20 W",
    }
    assert machine.gpu_state(torch.device("cpu")) is None


def test_sdpa_operator() -> None:
    found = machine.sdpa_operator(torch.device("cpu"), torch.float32, 2, 16, 2, 32)
    assert found is not None and "attention" in found


def test_facts_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    facts = machine.facts(torch.device("cpu"))
    assert facts["commit"] is None and facts["uncommitted_changes"] is None
