"""A pytest plugin of ``gpu_report.py``: every result at once as a line of a file, so that a run
that is cut off leaves what it found.

    FASTGPT_RESULTS=results.jsonl pytest -p _visit_plugin ...

With pytest-xdist each worker writes its own lines. A worker in which the GPU failed for good (an
illegal address, a device assert) says so and ends, since every later test of its process would fail
too; xdist starts another. The benchmarks of all ops come in the order of worth: the first size of
each op before the second, torch.compile last.
"""

import json
import os
from typing import Any

import pytest

_BROKEN = ("CUDA error", "Triton Error [CUDA]")  # the process cannot use its GPU any more
_SPARED = ("out of memory",)  # but it can after this


def _write(**record: Any) -> None:
    line = json.dumps(record) + "\n"
    handle = os.open(os.environ["FASTGPT_RESULTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(handle, line.encode())  # in one piece: others write too
    finally:
        os.close(handle)


def pytest_runtest_logstart(nodeid: str) -> None:
    if _runs_tests():
        _write(test=nodeid, outcome="started")


def pytest_collectreport(report: Any) -> None:
    if report.failed and _runs_tests():
        _write(test=report.nodeid, outcome="failed", seconds=0.0, message=_message(report))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "???":  # xdist: the worker died in this test
        _write(test=report.nodeid, outcome="failed", seconds=0.0, message=_message(report))
    elif _runs_tests() and (report.when == "call" or report.outcome != "passed"):
        message = None if report.passed else _message(report)
        figures = dict(report.user_properties).get("figures")
        _write(
            test=report.nodeid,
            outcome=report.outcome,
            seconds=report.duration,
            message=message,
            **({} if figures is None else {"figures": figures}),
        )
        broken = message is not None and any(text in message for text in _BROKEN)
        if broken and "PYTEST_XDIST_WORKER" in os.environ:
            if not any(text in str(message) for text in _SPARED):
                os._exit(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_worth)


def _worth(item: pytest.Item) -> tuple[int, int]:
    row: Any = item.callspec.params.get("row") if hasattr(item, "callspec") else None
    if not hasattr(row, "provider"):
        return 0, 0
    sizes = [tuple(one.items()) for one in (*row.op.gpu_sizes, *row.op.cpu_sizes)]
    return int(row.provider == "compile"), sizes.index(row.sizes)


def _runs_tests() -> bool:
    """Not so in a process that only hands them to workers."""
    return "PYTEST_XDIST_WORKER" in os.environ or not os.environ.get("FASTGPT_WORKERS")


def _message(report: Any) -> str:
    """The last line of what went wrong that says so."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message).strip()[:500]
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return str(report.longrepr[2])
    lines = str(report.longrepr).strip().splitlines()
    return lines[-1][:500] if lines else ""
