"""Dispatch of ops by the tensor's device, GPUs that the Triton kernels do not support, and the
interface shared by all implementations of the ops.

There is no GPU here: device properties are made up and computation runs on fake tensors. These have
no values, so code that reads one, which would wait for a GPU, fails.
"""

import copy
import functools
import inspect
import pickle
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from fastgpt import GPT, GPTConfig, ops
from fastgpt.kernels import _host, fused, fused_rows, reference, torch_ops
from fastgpt.kernels._tensors import matmul_float32
from tests.kernels.every_op import CASES

CUDA = [torch.device("cuda", index) for index in (0, 1)]


@pytest.fixture(autouse=True)
def _no_choice_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_known", {})
    monkeypatch.setattr(ops, "_notice", functools.cache(ops._notice.__wrapped__))


def _gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> list[int]:
    """Pretend to have GPUs of these capabilities; return the indices that are queried."""
    asked: list[int] = []

    def properties(index: int) -> Any:
        asked.append(index)
        major, minor = capabilities[index]
        return SimpleNamespace(name="Some GPU", major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    return asked


@pytest.mark.parametrize(
    "capability, kernels",
    [((7, 5), fused_rows), ((8, 0), fused), ((8, 6), fused), ((9, 0), fused), ((12, 0), fused)],
)
def test_a_gpu_of_the_kernels(
    capability: tuple[int, int], kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _gpus(monkeypatch, capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops._implementation(CUDA[0]) is kernels


@pytest.mark.parametrize(
    "capability, changes, why",
    [
        ((7, 0), {}, "need compute capability 7.5, and Some GPU has 7.0"),
        ((6, 1), {}, "need compute capability 7.5, and Some GPU has 6.1"),
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
    asked = _gpus(monkeypatch, (9, 0), (7, 0))
    first: list[int] = []
    with pytest.warns(UserWarning, match="has 7.0"):
        for _ in range(3):
            assert ops._implementation(CUDA[0]) is fused
            assert ops._implementation(CUDA[1]) is torch_ops
            first = first or asked.copy()
    assert asked == first and {*asked} == {0, 1}


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


# The ops that PyTorch can trace on a device it was not built for.
OPS = sorted({*reference.OPS} - {"adamw", "attention_decode", "attention_qkvpacked"})


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _gpus(monkeypatch, (7, 0))
    monkeypatch.setattr(ops, "_notice", lambda text: None)
    with FakeTensorMode(), torch.no_grad():
        yield


@pytest.mark.parametrize("op", OPS)
def test_no_op_runs_in_triton_or_waits_for_the_device(op: str, old_gpu: None) -> None:
    arguments = {
        name: _cuda(*x.shape, dtype=x.dtype) if isinstance(x, Tensor) else x
        for name, x in CASES[op].valid.items()
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
    """Only cuBLAS has ``mm`` from half precision into float32."""
    for hip, expected in ((None, "aten.mm.dtype"), ("7.0", "aten.mm.out")):
        monkeypatch.setattr(torch.version, "hip", hip)
        with FakeTensorMode(), torch.no_grad(), _Called() as called:
            out = matmul_float32(_cuda(2, 2, dtype=torch.float16), _cuda(2, 2, dtype=torch.float16))
        assert out.dtype == torch.float32 and expected in called.names


# -- a GPU whose tensor cores Triton does not use


def test_no_matrix_product_is_tritons_before_8_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step and a generated token launch no Triton kernel with a matrix product."""
    launched: set[str] = set()

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launched.add(kernel.__name__)
        assert not [name for name in DOTS if name in kernel.__name__]

    monkeypatch.setattr(JITFunction, "run", note)
    config = GPTConfig(block_size=64, vocab_size=128, n_layer=1, n_head=2, n_embd=64, dropout=0.1)
    with _host.interpreted(capability=75):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            model = GPT(config, ops=fused_rows).to(dtype)
            idx = torch.zeros(2, 64, dtype=torch.int64)
            model(idx, idx)[1].backward()
            model.recompute = True
            model(idx, idx)[1].backward()
        cache = torch.zeros(2, 2, 2, 64, 32)
        fused_rows.attention_decode(torch.zeros(2, 1, 192), cache, torch.zeros(2).long())
    assert len(launched) > 10 and "_attention_decode_kernel" in launched


DOTS = "_attention_fwd", "_attention_bwd", "_linear_gelu", "_weight_grad"


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_before_8_0(dropout: float, device: str) -> None:
    """Loss and gradients equal the plain ops'; dropout masks come from PyTorch's generator."""
    config = GPTConfig(32, 65, 2, 2, 32, dropout)
    torch.manual_seed(0)
    models = [GPT(config, ops=module).to(device) for module in (fused_rows, reference)]
    models[1].load_state_dict(models[0].state_dict())
    idx = torch.randint(65, (2, 32), device=device)
    losses, gradients = [], []
    with _host.interpreted(capability=75):
        for model in models:
            torch.manual_seed(1)
            loss = model(idx, idx.roll(-1, 1))[1]
            loss.backward()
            losses.append(loss.item())
            found = (p.grad for p in model.parameters())
            gradients.append(torch.cat([grad.flatten() for grad in found if grad is not None]))
            if dropout:
                torch.manual_seed(1)
                assert model(idx, idx.roll(-1, 1))[1].item() == losses[-1]
                assert model(idx, idx.roll(-1, 1))[1].item() != losses[-1]
    if dropout:
        assert abs(losses[0] - losses[1]) < 0.2
    else:
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
        assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


# -- the ops as Python objects

MODULES = (reference, torch_ops, fused, fused_rows, ops)


@pytest.mark.parametrize("op", [*reference.OPS, "dropout_seed"])
def test_every_implementation_of_an_op_has_one_signature(op: str) -> None:
    signatures = {str(inspect.signature(getattr(module, op))) for module in MODULES}
    assert len(signatures) == 1, signatures


def test_an_op_is_found_where_it_is_called() -> None:
    """help(), pickle and copying a model rely on this."""
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
