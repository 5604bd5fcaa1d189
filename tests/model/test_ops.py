"""The four modules of ops are interchangeable, and what a user sees of them."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch

from fastgpt import ops
from fastgpt.kernels import fused, reference, torch_ops

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
