"""``Cases`` of every op for the checks shared by all, collected from the ops' test files."""

from importlib import import_module
from importlib.util import find_spec

import pytest

from fastgpt.kernels import reference
from tests.tools.calls import Call, Cases


def cases_of(op: str, file: str) -> Cases:
    """The ``Cases`` of ``op`` in tests/kernels/test_<file>.py."""
    name = f"tests.kernels.test_{file}"
    for value in vars(import_module(name)).values() if find_spec(name) else ():
        if isinstance(value, Cases) and value.op == op:
            return value
    pytest.fail(f"tests/kernels/test_{file}.py must hold Cases({op!r}, ...)", pytrace=False)


CASES = {op: cases_of(op, file) for op, file in reference.OPS.items()}


def _named(kind: str) -> dict[str, Call]:
    """ "calls" or "variants" of all ops by names such as "gelu" and "gelu, tanh"."""
    return {
        f"{op}, {options}" if options else op: call._replace(op=op)
        for op, cases in CASES.items()
        for options, call in getattr(cases, kind).items()
    }


CALLS, VARIANTS = _named("calls"), _named("variants")

every_op = pytest.mark.parametrize("op", CASES)
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
