"""``pytest --ptx=80``: kernel tests on CPU tensors run the PTX that Triton compiles for sm_80."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator

import pytest

from tests.tools.ptx import launches, machine
from tests.tools.ptx.parser import Unsupported

_SKIPPED = "not on the PTX machine: "
# These test the interpreter or its observers.
_OF_THE_INTERPRETER = ("test_interpreter.py", "test_sanitizer.py", "test_addresses.py")
_TESTS_OF_THE_INTERPRETER = (
    # Runs only the last of many thousand programs, through the interpreter's observer.
    "test_linear_cross_entropy_edges.py::test_addresses_past_2_to_31",
    # Counts products in the interpreter.
    "test_attention_lengths.py::test_tiles_of_padding_are_not_visited",
    # Expects the error of an interpreted launch.
    "test_lowering.py::test_a_method_of_an_argument_does_not_compile_for_1",
)


class CompiledKernels:
    """The plugin. Tests that need unsupported code are skipped by name and counted."""

    def __init__(self, capability: int) -> None:
        if reason := machine.unavailable():
            raise pytest.UsageError(f"--ptx={capability}: {reason}")
        self._capability = capability
        self._compiled = launches.compiled_for(capability)

    def pytest_sessionstart(self) -> None:
        self._compiled.__enter__()

    def pytest_sessionfinish(self) -> None:
        self._compiled.__exit__(None, None, None)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            of_the_interpreter = item.nodeid.endswith(_TESTS_OF_THE_INTERPRETER)
            if item.path.name in _OF_THE_INTERPRETER or of_the_interpreter:
                item.add_marker(pytest.mark.skip(reason="tests the interpreter"))
            elif self._capability < 89 and item.path.name.startswith("test_fp8"):
                reason = f"{_SKIPPED}sm_{self._capability} has no numbers of 8 bits"
                item.add_marker(pytest.mark.skip(reason=reason))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        try:
            return (yield)
        except Unsupported as e:
            pytest.skip(f"{_SKIPPED}{e}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        reasons: Counter[str] = Counter()
        for report in terminalreporter.stats.get("skipped", []):
            if found := re.search(_SKIPPED + r"(.*?)( \(line \d+\))?$", str(report.longrepr[2])):
                reasons[found[1]] += 1
        for reason, times in sorted(reasons.items()):
            terminalreporter.write_line(f"{times} skipped, {_SKIPPED}{reason}")
