"""The tuner without a GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt.kernels import _host, configs
from fastgpt.tuning import tuner
from fastgpt.tuning.phase import Phase


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on an sm_90, with a clock that finds every launch as fast as any other."""
    monkeypatch.setenv("FASTGPT_TUNED", str(tmp_path))
    monkeypatch.setattr(configs, "_TUNED", {None: {}})
    monkeypatch.setattr(tuner, "ROUNDS", 1)
    monkeypatch.setattr(tuner, "Occupier", lambda device: lambda: None)
    monkeypatch.setattr(tuner, "milliseconds", lambda work, device: 1.0)
    with _host.interpreted(True, 90):
        yield


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are not checked."""
    monkeypatch.setattr(Phase, "right", lambda phase: None)
    monkeypatch.setattr(Phase, "check", lambda phase, right: None)
