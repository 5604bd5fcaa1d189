"""Operators of ``_operators`` with unusual tensors and modes, and in Inductor."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgpt.kernels import _operators, fused
from fastgpt.kernels._operators import fake, operator
from tests.kernels.every_op import every_call
from tests.tools.calls import Call, as_tuple, tensors_of


@every_call
def test_inference_mode_and_negated_views(device: str, call: Call) -> None:
    def results(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(7)  # dropout
        return as_tuple(call.run(fused, *tensors))

    tensors = [x.detach() for x in tensors_of(call, device)]
    expected = results(*tensors)
    with torch.inference_mode():
        found = results(*tensors)
    assert all(y.is_inference() for y in found) and all(map(torch.equal, found, expected))
    found = results(*(torch._neg_view(-x) for x in tensors))
    assert all(map(torch.equal, found, expected))


def _twice(x: Tensor) -> Tensor:
    return 2 * x


def test_inductor_knows_an_operator_before_it_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor of PyTorch 2.11 prints an operator that it does not know, with both paths to every
    step of a residual stream: exponentially long."""
    from torch._inductor import graph
    from torch._inductor.utils import fresh_cache

    op = operator("test_known")(_twice)
    fake(op)(torch.empty_like)
    met: list[Any] = []

    def noted(op: Any, *_: Any, **options: Any) -> None:
        met.append(op)

    def stop(*_: Any) -> None:
        raise InterruptedError("all is lowered")

    monkeypatch.setattr(graph, "make_fallback", noted)
    monkeypatch.setattr(graph.GraphLowering, "codegen", stop)
    monkeypatch.setattr(_operators, "_INDUCTOR_LOGS_FALLBACKS", True)

    def stream(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + op(x)
        return x

    # A cache hit would lower nothing.
    with fresh_cache(), pytest.raises(Exception, match="all is lowered"):
        torch.compile(stream)(torch.randn(3, 4))
    assert op not in met
