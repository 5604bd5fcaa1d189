"""A pytest plugin: after a kernel error that breaks the CUDA context (illegal address, device
assert), all later tests of the process would fail. So the pytest-xdist worker exits, and a new one
runs the remaining tests.
"""

import os

import pytest

_is_worker = False


def pytest_configure(config: pytest.Config) -> None:
    global _is_worker
    _is_worker = hasattr(config, "workerinput")  # the environment may be an outer worker's


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Only for GPU tests: others may show the message of another process or of the pretended
    device."""
    message = str(report.longrepr)
    broken = "CUDA error" in message or "Triton Error [CUDA]" in message
    on_gpu = "gpu" in report.keywords
    if _is_worker and report.failed and on_gpu and broken and "out of memory" not in message:
        os.write(2, f"{report.nodeid}\n{message}\n".encode())
        os._exit(1)
