"""Stand-ins, built on PyTorch's functions, for packages that need a GPU."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Install stand-ins for Liger-Kernel and QuACK; return the names of the functions called."""
    called: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            called.append(name)
            return function(*args, **options)

        return call

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def loss(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
        assert x.dim() == 2 and targets.dim() == 1
        return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=ignore_index)

    def biased_loss(x: Tensor, weight: Tensor, bias: None, *args: Any, **options: Any) -> Tensor:
        return loss(x, weight, *args, **options)

    modules = {
        "liger_kernel.transformers.functional": {
            "liger_layer_norm": layer_norm,
            "liger_fused_linear_cross_entropy": loss,
        },
        "quack.linear_cross_entropy": {
            "chunked_linear_cross_entropy": loss,
            "linear_cross_entropy_func": biased_loss,
        },
    }
    for name, functions in modules.items():
        module = SimpleNamespace(**{key: noted(key, f) for key, f in functions.items()})
        monkeypatch.setitem(sys.modules, name, module)
    return called
