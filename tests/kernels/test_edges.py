"""Edge cases of every op: sizes of 0, expanded gradients, memory layouts."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastgpt.kernels import _host, fused, reference
from tests.kernels.every_op import CALLS, every_call
from tests.tools.calls import Call, Shapes, as_tuple, columns_first, gradients_of, tensors_of

# ------------------------------------------------------------------------- nothing to compute


_EMPTY = [(name, shapes) for name, call in CALLS.items() for shapes in call.empty]


@pytest.mark.parametrize(("name", "shapes"), _EMPTY, ids=str)
def test_nothing_to_compute(ops, device: str, name: str, shapes: Shapes) -> None:
    call, outcomes = CALLS[name], []
    leaves = [torch.randn(shape, device=device) for shape in shapes]
    for implementation in (reference, ops):
        tensors = [x.clone().requires_grad_() for x in leaves]
        with FlopCounterMode(display=False):
            out = as_tuple(call.run(implementation, *tensors))
            outcomes.append([*(y.detach() for y in out), *gradients_of(out, tensors)])
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5, equal_nan=True)
    with FakeTensorMode():
        tensors = [torch.zeros(shape, device=device, requires_grad=True) for shape in shapes]
        out = as_tuple(call.run(ops, *tensors))
        fakes = [*out, *torch.autograd.grad(out, tensors, [torch.zeros_like(y) for y in out])]
    assert [x.shape for x in fakes] == [x.shape for x in outcomes[0]]


# ------------------------------------------------------------------------- expanded gradients


@pytest.mark.parametrize("single", [False, True], ids=["ragged", "single"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if call.single])
def test_expanded_gradients(device: str, name: str, dtype: torch.dtype, single: bool) -> None:
    """The incoming gradient of ``y.sum().backward()`` has strides of 0."""
    call = CALLS[name]
    shapes = (single and call.single) or call.shapes
    leaves = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    for launches in (None, 90) if device == "cpu" else (None,):
        with _host.interpreted(_host.INTERPRETED, launches):
            out = as_tuple(call.run(fused, *leaves))
            expanded = [torch.ones((), dtype=y.dtype, device=device).expand(y.shape) for y in out]
            dense = [torch.ones(y.shape, dtype=y.dtype, device=device) for y in out]
            got = torch.autograd.grad(out, leaves, expanded, retain_graph=True)
            expected = torch.autograd.grad(out, leaves, dense)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


# ----------------------------------------------------------------------------- memory layouts


@every_call
def test_results_are_contiguous(device: str, call: Call) -> None:
    """Results of Triton ops are contiguous for any input strides; ``attention`` in token order."""
    dense = tensors_of(call, device)
    strided = [columns_first(x) if x.dim() > 1 else x.repeat(2)[::2] for x in dense]
    for tensors in (dense, [x.detach().requires_grad_() for x in strided]):
        for y in as_tuple(call.run(fused, *tensors)):
            if call.op == "attention":
                assert y.stride(3) == 1 and sorted(y.stride(), reverse=True) == [
                    y.stride(dim) for dim in (0, 2, 1, 3)
                ]
            else:
                assert y.is_contiguous()
