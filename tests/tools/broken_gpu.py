"""A plugin of pytest: after a kernel that fails for good (an illegal address, a device assert) all
later tests of its process fail. A worker of pytest-xdist ends there, and another goes on with the
rest.
"""

import os

import pytest

_is_worker = False


def pytest_configure(config: pytest.Config) -> None:
    global _is_worker
    _is_worker = hasattr(config, "workerinput")  # the environment may be that of an outer worker


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Other tests than those for a GPU may show the message of another process, or of a pretended
    device."""
    message = str(report.longrepr)
    broken = "CUDA error" in message or "Triton Error [CUDA]" in message
    on_gpu = "gpu" in report.keywords
    if _is_worker and report.failed and on_gpu and broken and "out of memory" not in message:
        os.write(2, f"{report.nodeid}\n{message}\n".encode())
        os._exit(1)
