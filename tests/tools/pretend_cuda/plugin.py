"""pytest's side, in a process that pretends a device: a test with a finding fails.

    python -m tests.tools.pretend_cuda -m pytest -n0 -p tests.tools.pretend_cuda.plugin \\
        tests/training/test_step.py
"""

from collections.abc import Iterator

import pytest

from tests.tools.pretend_cuda import device


@pytest.fixture(autouse=True)
def _findings() -> Iterator[None]:
    yield
    if found := device.end():
        pytest.fail("pretended device: " + "\n".join(found))
