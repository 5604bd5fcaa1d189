"""torch.func on every op: grad, vmap and forward mode give correct results or raise a clear error.
Saved tensors that are unpacked with other strides, as by vmap and by offloading to the host."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastgpt.kernels import fused, reference, torch_ops
from tests.kernels.every_op import CALLS, every_call
from tests.tools.calls import Call, as_tuple, columns_first, tensors_of, weights_of

Loss = Callable[..., Tensor]
grad: Callable[..., Any] = torch.func.grad
jvp: Callable[..., Any] = torch.func.jvp


def _loss(ops, call: Call) -> Loss:
    def loss(*tensors: Tensor) -> Tensor:
        torch.manual_seed(7)  # dropout
        out = as_tuple(call.run(ops, *tensors))
        sums = [(y * weight).sum() for y, weight in zip(out, weights_of(out), strict=True)]
        return torch.stack(sums).sum()

    return loss


def _tensors(call: Call, device: str, *batch: int) -> list[Tensor]:
    return [x.detach() for x in tensors_of(call, device, *batch)]


def _expected(loss: Loss, tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return list(torch.autograd.grad(loss(*leaves), leaves))


@every_call
def test_grad(ops, device: str, call: Call) -> None:
    loss, tensors = _loss(ops, call), _tensors(call, device)
    everything = tuple(range(len(tensors)))
    with torch.no_grad():  # has no effect inside
        got = grad(loss, everything)(*tensors)
    torch.testing.assert_close(list(got), _expected(loss, tensors))
    assert not any(x.requires_grad for x in got)
    _, pullback, *_ = torch.func.vjp(loss, *tensors)
    torch.testing.assert_close(pullback(torch.ones((), device=device)), got)


def _with_gaps(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0] if x.dim() > 1 else x


@pytest.mark.parametrize(
    ("ops", "changed"),
    [
        (fused, Tensor.contiguous),  # like torch.autograd.graph.save_on_cpu(pin_memory=True)
        (torch_ops, Tensor.contiguous),
        (fused, columns_first),  # PyTorch's own kernels give wrong gradients here
        (fused, _with_gaps),
    ],
)
@every_call
def test_saved_tensors_with_other_strides(ops, device: str, call: Call, changed) -> None:
    loss, x = _loss(ops, call), _tensors(call, device)
    expected = _expected(loss, x)
    with torch.autograd.graph.saved_tensors_hooks(changed, lambda saved: saved):
        torch.testing.assert_close(_expected(loss, x), expected)


_WITHOUT_DROPOUT = [name for name in CALLS if "dropout" not in name]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own operators
@pytest.mark.parametrize("name", _WITHOUT_DROPOUT)
def test_a_gradient_for_each_element_of_a_batch(ops, device: str, name: str) -> None:
    """The batch is the first tensor's last dimension; the last of several tensors is not
    batched."""
    call = CALLS[name]
    loss, (first, *others) = _loss(ops, call), _tensors(call, device, 3)
    tensors: list[Tensor] = [first.movedim(0, -1), *others]
    dims: list[int | None] = [-1, *(0 for _ in others)]
    if others:
        tensors[-1], dims[-1] = others[-1][0], None
    gradients = grad(loss, tuple(range(len(tensors))))
    got = torch.func.vmap(gradients, in_dims=tuple(dims))(*tensors)
    for i in range(3):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip(tensors, dims, strict=True)]
        torch.testing.assert_close([x[i] for x in got], _expected(loss, one))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own operators
@pytest.mark.parametrize("name", _WITHOUT_DROPOUT)
def test_the_gradient_of_a_batch(ops, device: str, name: str) -> None:
    """grad of vmap: inside vmap no tensor appears to require a gradient."""
    if ops is torch_ops and device == "cuda" and "attention" in name:
        pytest.skip("PyTorch's backward of attention on a GPU refuses what its vmap gives it")
    loss, tensors = _loss(ops, CALLS[name]), _tensors(CALLS[name], device, 2)

    def of_batch(*tensors: Tensor) -> Tensor:
        total: Tensor = torch.func.vmap(loss)(*tensors).sum()
        return total

    expected = _expected(
        lambda *tensors: loss(*(x[0] for x in tensors)) + loss(*(x[1] for x in tensors)), tensors
    )
    torch.testing.assert_close(_expected(of_batch, tensors), expected)
    got = grad(of_batch, tuple(range(len(tensors))))(*tensors)
    torch.testing.assert_close(list(got), expected)


def test_an_empty_batch_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="vmap over gelu must have a batch of at least 1, got 0"):
        torch.func.vmap(fused.gelu)(torch.empty(0, 4, device=device))


@every_call
def test_no_tangent_is_lost(device: str, call: Call) -> None:
    tensors, tangents = _tensors(call, device), _tensors(call, device)
    exact = _loss(reference, call)
    gradients = _expected(exact, tensors)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    _, got = jvp(exact, tuple(tensors), tuple(tangents))
    torch.testing.assert_close(got, expected)
    for ops in (fused, torch_ops):
        loss = _loss(ops, call)
        for requires_grad in (False, True):
            try:
                with forward_ad.dual_level():
                    duals = [
                        forward_ad.make_dual(x.clone().requires_grad_(requires_grad), t)
                        for x, t in zip(tensors, tangents, strict=True)
                    ]
                    _, found = forward_ad.unpack_dual(loss(*duals))
                _, got = jvp(loss, tuple(tensors), tuple(tangents))
            except NotImplementedError as error:
                assert "forward" in str(error)
                continue
            assert ops is torch_ops and found is not None
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(got, expected)
    plain = _loss(fused, call)(*tensors)  # inputs without tangents
    with forward_ad.dual_level():
        torch.testing.assert_close(_loss(fused, call)(*tensors), plain)


def test_forward_mode_names_the_op() -> None:
    x = torch.randn(3)
    message = "^gelu has no forward-mode derivative .* the ops of fastgpt.kernels.reference$"
    with pytest.raises(NotImplementedError, match=message):
        jvp(fused.gelu, (x,), (x,))
    with pytest.raises(NotImplementedError, match=message):  # forward-over-reverse
        jvp(grad(lambda x: fused.gelu(x).sum()), (x,), (x,))
    with pytest.raises(RuntimeError, match="^gelu has no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: fused.gelu(x).sum())(x).sum())(x)
