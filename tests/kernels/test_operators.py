"""An operator of ``_operators`` beside its twin of ``torch.library.custom_op``: the tools that know
PyTorch's operators find no difference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastgpt.kernels import _operators
from fastgpt.kernels._operators import differentiable, fake, operator


def _powers(x: Tensor, scale: float, cube: bool) -> list[Tensor]:
    """scale x² and, if ``cube``, scale x³."""
    return [scale * x**2] + ([scale * x**3] if cube else [])


def _powers_bwd(x: Tensor, scale: float, dsquare: Tensor | None, dcube: Tensor | None) -> Tensor:
    dx = torch.zeros_like(x)
    dx += 0.0 if dsquare is None else 2 * scale * x * dsquare
    dx += 0.0 if dcube is None else 3 * scale * x**2 * dcube
    return dx


def _twice(x: Tensor) -> Tensor:
    return 2 * x


def _setup_context(ctx, inputs, output):
    x, ctx.scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x)


ours = operator("test_powers")(_powers)
ours_bwd = operator("test_powers_bwd")(_powers_bwd)
fake(ours)(lambda x, scale, cube: [torch.empty_like(x) for _ in range(1 + cube)])
fake(ours_bwd)(lambda x, *_: torch.empty_like(x))


def _backward(ctx, dsquare, dcube=None):
    return ours_bwd(*ctx.saved_tensors, ctx.scale, dsquare, dcube), None, None


differentiable(ours, _backward, _setup_context)

twin = torch.library.custom_op("fastgpt::test_twin", _powers, mutates_args=())
twin.register_fake(lambda x, scale, cube: [torch.empty_like(x) for _ in range(1 + cube)])
twin.register_autograd(lambda ctx, grads: _backward(ctx, *grads), setup_context=_setup_context)


def _x(*shape: int, requires_grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, requires_grad=requires_grad)


def _plain(op: Any) -> Any:
    x = _x(3, 4, requires_grad=True)
    with torch.no_grad():
        out = op(x, 2.0, True)
    assert not any(t.requires_grad for t in out)
    square, cube = op(x, 2.0, True)
    return out, torch.autograd.grad(square.sum() + (cube * cube).sum(), x)


def _one_gradient(op: Any) -> Any:
    x = _x(5, requires_grad=True)
    return torch.autograd.grad(op(x, 2.0, True)[1].sum(), x), op(x.detach(), 1.0, False)


def _checkpointed(op: Any) -> Any:
    x = _x(6, requires_grad=True)
    y = checkpoint(lambda x: op(x, 0.5, False)[0], x, use_reentrant=False)
    return torch.autograd.grad(y.sum(), x)


def _compiled(op: Any) -> Any:
    x = _x(4, 4, requires_grad=True)
    function = torch.compile(lambda x: op(x, 2.0, True)[1] * 2, backend="aot_eager", fullgraph=True)
    return torch.autograd.grad(function(x).sum(), x)


def _fake(op: Any) -> Any:
    with FakeTensorMode():
        out = op(torch.empty(3, 2, dtype=torch.float16), 1.0, True)
    assert all(isinstance(t, FakeTensor) for t in out)
    return [torch.zeros(t.shape, dtype=t.dtype) for t in out]


def _inference_and_negated(op: Any) -> Any:
    with torch.inference_mode():
        out = op(_x(2), 1.0, True)
    assert all(t.is_inference() for t in out)
    return out, op(torch._neg_view(_x(2)), 1.0, False)


_USES = [_plain, _one_gradient, _checkpointed, _compiled, _fake, _inference_and_negated]


@pytest.mark.parametrize("use", _USES, ids=lambda use: use.__name__.strip("_"))
def test_as_custom_op(use: Callable[[Any], Any]) -> None:
    torch.testing.assert_close(use(ours), use(twin), rtol=0.0, atol=0.0)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastgpt":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_each_operator_once_and_nothing_inside() -> None:
    x = _x(3, requires_grad=True)
    with _Names() as mode:
        ours(x, 1.0, False)[0].sum().backward()
    assert mode.names == ["fastgpt::test_powers", "fastgpt::test_powers_bwd"]


def test_no_gradient_of_a_gradient() -> None:
    x = _x(3, requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x, 1.0, False)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="^test_powers has no second derivative: "):
        dx.sum().backward()


def test_opcheck() -> None:
    torch.library.opcheck(ours, (_x(3, requires_grad=True), 1.0, True))
    torch.library.opcheck(ours_bwd, (_x(3), 1.0, _x(3), None))


def test_inductor_knows_an_operator_before_it_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11's describes one that it does not know, with both ways that lead to every step of
    a residual stream."""
    from torch._inductor import graph
    from torch._inductor.utils import fresh_cache

    op = operator("test_known")(_twice)
    fake(op)(torch.empty_like)
    met: list[Any] = []
    make_fallback = graph.make_fallback

    def noted(op: Any, *args: Any, **options: Any) -> Any:
        met.append(op)
        return make_fallback(op, *args, **options)

    monkeypatch.setattr(graph, "make_fallback", noted)
    monkeypatch.setattr(_operators, "_INDUCTOR_DESCRIBES", True)

    def stream(x: Tensor) -> Tensor:
        for _ in range(12):
            x = x + op(x)
        return x

    x = _x(3, 4)
    with fresh_cache():  # where compiled code lies, nothing is lowered
        compiled = torch.compile(stream)(x)
    assert torch.equal(compiled, stream(x))
    assert op not in met
