"""Fixtures that run the tuner without a GPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgpt.kernels import _host
from tests.tuning.small_tuning import on_no_gpu, trust


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    on_no_gpu(monkeypatch, tmp_path)
    with _host.interpreted(True, 90):
        yield


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    trust(monkeypatch)
