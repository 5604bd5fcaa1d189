"""A pytest plugin of ``gpu_report.py``: every result at once as a line of a file, so that a run
that is cut off leaves what it found.

    pytest -p _visit_plugin --results-to=results.jsonl ...

With pytest-xdist each worker writes its own lines. A worker in which the GPU failed for good (an
illegal address, a device assert) says so and ends, since every later test of its process would fail
too; xdist starts another. The benchmarks of all ops come in the order of worth: the first size of
each op before the second, torch.compile last.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

_BROKEN = ("CUDA error", "Triton Error [CUDA]")  # the process cannot use its GPU any more
_SPARED = "out of memory"  # but it can after this


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results-to", type=Path, required=True, help="a file for JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    is_worker = hasattr(config, "workerinput")
    runs_tests = is_worker or not config.getoption("numprocesses", None)
    config.pluginmanager.register(_Results(config.getoption("results_to"), is_worker, runs_tests))


class _Results:
    """``runs_tests`` is False in a process that only hands them to workers."""

    def __init__(self, path: Path, is_worker: bool, runs_tests: bool) -> None:
        self._path = path
        self._is_worker = is_worker
        self._runs_tests = runs_tests

    def _write(self, **record: Any) -> None:
        line = json.dumps(record) + "\n"
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())  # in one piece: others write too
        finally:
            os.close(handle)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if self._runs_tests:
            self._write(test=nodeid, outcome="started")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and self._runs_tests:
            self._write(test=report.nodeid, outcome="failed", message=_message(report))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "???":  # xdist: the worker died in this test
            self._write(test=report.nodeid, outcome="failed", message=_message(report))
        elif self._runs_tests and (report.when == "call" or report.outcome != "passed"):
            message = None if report.passed else _message(report)
            figures = dict(report.user_properties).get("figures")
            self._write(
                test=report.nodeid,
                outcome=report.outcome,
                message=message,
                **({} if figures is None else {"figures": figures}),
            )
            if self._is_worker and message is not None and _broke_the_gpu(message):
                os._exit(1)


def _broke_the_gpu(message: str) -> bool:
    return any(text in message for text in _BROKEN) and _SPARED not in message


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_worth)


def _worth(item: pytest.Item) -> tuple[int, int]:
    row: Any = item.callspec.params.get("row") if hasattr(item, "callspec") else None
    if not hasattr(row, "provider"):
        return 0, 0
    sizes = [tuple(one.items()) for one in (*row.op.gpu_sizes, *row.op.cpu_sizes)]
    return int(row.provider == "compile"), sizes.index(row.sizes)


def _message(report: Any) -> str:
    """The last line of what went wrong that says so."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message).strip()[:500]
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return str(report.longrepr[2])
    lines = str(report.longrepr).strip().splitlines()
    return lines[-1][:500] if lines else ""
