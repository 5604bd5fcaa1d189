"""The four modules of ops are interchangeable."""

import importlib
import inspect
from typing import Any

import pytest

OPS = (
    "adamw",
    "attention",
    "attention_decode",
    "attention_qkvpacked",
    "dropout_seed",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "residual_layer_norm",
)


@pytest.mark.parametrize("op", OPS)
def test_every_implementation_of_an_op_has_one_signature(op: str) -> None:
    modules = ("kernels.fused", "kernels.torch_ops", "kernels.reference", "ops")
    signatures = {
        name: inspect.signature(getattr(importlib.import_module(f"fastgpt.{name}"), op))
        for name in modules
    }
    assert len(set(map(str, signatures.values()))) == 1, signatures


def public_functions(module: Any) -> set[str]:
    return {
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def test_every_public_op_has_all_four_implementations() -> None:
    fused = importlib.import_module("fastgpt.kernels.fused")
    assert tuple(fused.__all__) == OPS
    for name in ("kernels.fused", "kernels.torch_ops", "ops"):
        functions = public_functions(importlib.import_module(f"fastgpt.{name}"))
        assert functions - {
            "autocast_dtype",
            "document_mask",
            "split_heads",
            "unpacked",
            "widened",
        } == set(OPS), name
    assert public_functions(importlib.import_module("fastgpt.kernels.reference")) >= set(OPS)
