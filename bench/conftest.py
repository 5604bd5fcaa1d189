"""pytest hooks for ``bench_<op>.py``: require a single process, describe the machine without host
and user names, and print a table per op at the end.
"""

from dataclasses import asdict

import pytest
from rich.console import Console

from bench._harness import machine
from bench._ops import op_bench, op_report


def pytest_configure(config):
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("benchmarks must not run side by side: pytest -n0 bench")
    config.option.benchmark_quiet = True  # our own table shows the rates


def pytest_benchmark_generate_machine_info():
    found = machine.facts(op_bench.DEVICE)
    found["gpu_state"] = machine.gpu_state(op_bench.DEVICE)
    ceilings = op_bench.machine_ceilings()
    found["ceilings"] = None if ceilings is None else asdict(ceilings)
    return found


def pytest_terminal_summary(terminalreporter):
    passed = terminalreporter.stats.get("passed", [])
    figures = [dict(report.user_properties).get("figures") for report in passed]
    console = Console(width=120, highlight=False)
    with console.capture() as text:
        for table in op_report.tables(row for row in figures if row):
            console.print(table)
    terminalreporter.write(text.get())
