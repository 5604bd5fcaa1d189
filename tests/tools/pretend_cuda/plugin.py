"""Pytest plugin for a process with the pretended device: a test with a finding fails.

    python -m tests.tools.pretend_cuda -m pytest -n0 -p tests.tools.pretend_cuda.plugin \\
        tests/training/test_step.py
"""

import gc
from collections.abc import Iterator

import pytest

from tests.tools.pretend_cuda import device


def pytest_collection_finish() -> None:
    gc.freeze()  # as in the project's conftest


@pytest.fixture(autouse=True)
def _findings() -> Iterator[None]:
    yield
    if found := device.end():
        pytest.fail("pretended device: " + "\n".join(found))
