"""Input that all implementations of an op reject with the same message, or only one rejects."""

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgpt.kernels import _host, fused, reference, torch_ops
from tests.kernels.every_op import CASES, cases_of, every_op
from tests.tools.calls import ids

every_module = pytest.mark.parametrize(
    "module", [fused, torch_ops, reference], ids=["fused", "torch_ops", "reference"]
)


def kinds(op: str) -> dict[str, Any]:
    """Argument → annotation."""
    parameters = inspect.signature(getattr(reference, op)).parameters
    return {name: parameter.annotation for name, parameter in parameters.items()}


def in_float32(value: Any) -> Any:
    """Floats as NumPy scalars, which compare in float32."""
    if isinstance(value, tuple):
        return tuple(map(in_float32, value))
    return np.float32(value) if type(value) is float else value


@every_module
@every_op
def test_what_an_op_refuses(module: ModuleType, op: str) -> None:
    call, valid = getattr(module, op), CASES[op].valid
    call(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in valid.items()})
    for message, changes in CASES[op].refused.items():
        with pytest.raises(ValueError, match=message):
            call(**{**valid, **changes})
        with pytest.raises(ValueError, match=message.partition(", got")[0]):
            call(**{**valid, **{name: in_float32(x) for name, x in changes.items()}})


def wrong_tensors(op: str) -> Iterator[tuple[str, Any, type[Exception], str]]:
    """Argument, value, error and message: not a tensor, integer instead of floating point or vice
    versa, a device or dtype that differs from the others'."""
    valid, first = CASES[op].valid, next(iter(kinds(op)))
    for name, kind in kinds(op).items():
        if kind not in (Tensor, Tensor | None):
            continue
        yield name, 0.5, TypeError, f"^{name} must be a torch.Tensor, got float$"
        if kind is Tensor:
            yield name, None, TypeError, f"^{name} must be a torch.Tensor, got NoneType$"
        x = valid.get(name)
        if x is None:
            if name != "seed":
                yield name, ids(1), TypeError, f"^{name} must be .*, got torch.int64$"
            continue
        other = x.long() if x.is_floating_point() else x.float()
        yield name, other, TypeError, f"^{name} must be .*, got {other.dtype}$"
        if name == first:
            continue
        same = "be on the device of"
        yield name, x.to("meta"), ValueError, f"^{name} must {same} |must {same} {name} "
        if x.is_floating_point() and op != "adamw":  # float32 only
            same = "have the dtype of"
            yield name, x.double(), ValueError, f"^{name} must {same} |must {same} {name} "


@every_module
@every_op
def test_what_a_tensor_must_be(module: ModuleType, op: str) -> None:
    for name, value, error, message in wrong_tensors(op):
        with pytest.raises(error, match=message):
            getattr(module, op)(**{**CASES[op].valid, name: value})


_WRONG_VALUES: dict[Any, list[tuple[Any, str]]] = {
    float: [(None, "a number, got None"), ("0.1", "a number, got '0.1'")],
    float | None: [("0.1", "a number, got '0.1'")],
    int: [
        (None, "an integer, got None"),
        ("1", "an integer, got '1'"),
        (2.0, "an integer, got 2.0"),
    ],
    bool: [("no", "True or False, got 'no'"), (None, "True or False, got None")],
    tuple[float, float]: [
        (None, "two numbers, got None"),
        ((0.9,), r"two numbers, got \(0.9,\)"),
        (("0.9", 0.95), "a number, got '0.9'"),
    ],
}


@every_module
@every_op
def test_what_must_be_a_number_or_a_flag(module: ModuleType, op: str) -> None:
    for name, kind in kinds(op).items():
        for value, must in _WRONG_VALUES.get(kind, ()):
            with pytest.raises(TypeError, match=rf"^{name}(\[0\])? must be {must}$"):
                getattr(module, op)(**{**CASES[op].valid, name: value})


@every_op
def test_the_kernels_refuse_other_devices_and_dtypes(op: str) -> None:
    """Without the interpreter, CPU tensors, float64 and fp8 are rejected."""
    valid = CASES[op].valid
    with _host.interpreted(False):
        with pytest.raises(ValueError, match="must be on a CUDA device, got cpu"):
            getattr(fused, op)(**valid)
        floating = {k for k, v in valid.items() if isinstance(v, Tensor) and v.is_floating_point()}
        for dtype in (torch.float64, torch.float8_e4m3fn):
            others = {name: valid[name].to(dtype) for name in floating}
            with pytest.raises(TypeError, match=f"must be (torch.)?float32.*got {dtype}"):
                getattr(fused, op)(**{**valid, **others})


@pytest.mark.parametrize("op", [op for op in CASES if "seed" in kinds(op)])
def test_torch_ops_refuse_a_seed(op: str) -> None:
    with pytest.raises(ValueError, match="seed must be None on cpu: PyTorch's generator draws"):
        getattr(torch_ops, op)(**CASES[op].valid, dropout_p=0.1, seed=ids(1))


def test_an_op_without_cases_is_named() -> None:
    """The op has no test file, or its test file has no ``Cases``."""
    for file in ("gelu", "swish"):
        message = rf"^tests/kernels/test_{file}.py must hold Cases\('swish', ...\)$"
        with pytest.raises(pytest.fail.Exception, match=message):
            cases_of("swish", file)
