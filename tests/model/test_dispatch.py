"""Which kernels a tensor's device gets, and that a GPU which Triton is not for does all the rest;
the interface that all implementations of the ops share.

There is no GPU here: the device's properties are made up, and what is computed is on fake tensors.
Those have no values, so that code which asks for one, and would wait for a GPU, fails.
"""

import copy
import functools
import inspect
import pickle
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops
from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.kernels._tensors import matmul_float32
from tests.kernels.test_errors import VALID

CUDA = [torch.device("cuda", index) for index in (0, 1)]


@pytest.fixture(autouse=True)
def _no_choice_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_refusals", {})
    monkeypatch.setattr(ops, "_notice", functools.cache(ops._notice.__wrapped__))


def _gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> list[int]:
    """The indices of the GPUs that are asked about."""
    asked: list[int] = []

    def properties(index: int) -> Any:
        asked.append(index)
        major, minor = capabilities[index]
        return SimpleNamespace(name="Some GPU", major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return asked


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_a_gpu_of_the_kernels(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    _gpus(monkeypatch, capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops._implementation(CUDA[0]) is fused


@pytest.mark.parametrize(
    "capability, changes, why",
    [
        ((7, 5), {}, "need compute capability 8.0, and Some GPU has 7.5"),
        ((6, 1), {}, "need compute capability 8.0, and Some GPU has 6.1"),
        ((9, 4), {"torch.version.hip": "7.0"}, "this PyTorch is built for ROCm"),
        ((9, 0), {"fastgpt.devices._HAS_TRITON": False}, "Triton is not installed"),
    ],
)
def test_a_gpu_that_the_kernels_are_not_for(
    capability: tuple[int, int], changes: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _gpus(monkeypatch, capability, capability)
    for name, value in changes.items():
        monkeypatch.setattr(name, value)
    expected = f"{why}.*: CUDA tensors run on PyTorch's kernels"
    with pytest.warns(UserWarning, match=expected) as notices:
        for device in CUDA * 2:
            assert ops._implementation(device) is torch_ops
    assert len(notices) == 1


def test_each_gpu_is_asked_about_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _gpus(monkeypatch, (9, 0), (7, 5))
    with pytest.warns(UserWarning, match="has 7.5"):
        for _ in range(3):
            assert ops._implementation(CUDA[0]) is fused
            assert ops._implementation(CUDA[1]) is torch_ops
    assert asked == [0, 1]


def test_no_gpu_is_asked_about_for_other_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _gpus(monkeypatch)
    assert ops._implementation(torch.device("cpu")) is torch_ops
    assert ops._implementation(torch.device("meta")) is torch_ops
    assert not asked


# -- every op, on a GPU that is too old


class _Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def _cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=CUDA[0])


# Those that PyTorch traces on a device it was not built for.
OPS = sorted({*reference.OPS} - {"adamw", "attention_decode", "attention_qkvpacked"})


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _gpus(monkeypatch, (7, 5))
    monkeypatch.setattr(ops, "_notice", lambda text: None)
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.mark.parametrize("op", OPS)
def test_no_op_runs_in_triton_or_waits_for_the_device(op: str, old_gpu: None) -> None:
    arguments = {
        name: _cuda(*x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x
        for name, x in VALID[op].items()
    }
    drops = "dropout_p" in inspect.signature(getattr(ops, op)).parameters
    with _Called() as called:
        getattr(ops, op)(**arguments, **({"dropout_p": 0.5} if drops else {}))
    own = {name for name in called.names if name.startswith("fastgpt.")}
    assert called.names and all("torch_ops" in name for name in own), own


def test_the_generator_draws_every_mask(old_gpu: None) -> None:
    assert ops.dropout_seed(CUDA[0]) is None


def test_fp8_is_refused(old_gpu: None) -> None:
    with pytest.raises(ValueError, match="compute capability 8.9"):
        ops.linear_cross_entropy(
            _cuda(16, 16), _cuda(16, 16), _cuda(16, dtype=torch.int64), fp8=True
        )


def test_hipblas_is_asked_for_no_other_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """``mm`` of half precision into float32 is cuBLAS's."""
    for hip, expected in ((None, "aten.mm.dtype"), ("7.0", "aten.mm.out")):
        monkeypatch.setattr(torch.version, "hip", hip)
        with FakeTensorMode(), torch.no_grad(), _Called() as called:
            out = matmul_float32(_cuda(2, 2, dtype=torch.float16), _cuda(2, 2, dtype=torch.float16))
        assert out.dtype == torch.float32 and expected in called.names


# -- what a user sees of the ops

MODULES = (reference, torch_ops, fused, ops)


@pytest.mark.parametrize("op", [*reference.OPS, "dropout_seed"])
def test_every_implementation_of_an_op_has_one_signature(op: str) -> None:
    signatures = {str(inspect.signature(getattr(module, op))) for module in MODULES}
    assert len(signatures) == 1, signatures


def test_an_op_is_found_where_it_is_called() -> None:
    """As help(), pickle and copies of a model need it."""
    for name in reference.OPS:
        op = getattr(ops, name)
        assert op.__name__ == name and op.__doc__ == getattr(reference, name).__doc__
        assert pickle.loads(pickle.dumps(op)) is op and copy.deepcopy(op) is op


def test_arguments_by_name() -> None:
    x, weight = torch.randn(3, 8), torch.ones(8)
    assert ops.layer_norm(weight=weight, x=x).equal(torch_ops.layer_norm(x, weight))
    compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="eager")
    assert compiled(weight=weight, x=x).equal(torch_ops.layer_norm(x, weight))


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"layer_norm\(\) missing 2 required .* 'x' and 'weight'"),
        ((torch.ones(2, 4),), {}, r"layer_norm\(\) missing 1 required .* 'weight'"),
        ((torch.ones(2, 4), torch.ones(4)), {"epsilon": 0.1}, "unexpected keyword .* 'epsilon'"),
        (([1.0, 2.0], torch.ones(2)), {}, "x must be a torch.Tensor, got list"),
    ],
)
def test_wrong_calls(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ops.layer_norm(*args, **kwargs)
