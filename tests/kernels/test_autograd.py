"""Every op in autograd: checkpointing, in-place changes, frozen tensors, determinism, first and
second derivatives."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from fastgpt.kernels import fused, reference, torch_ops
from tests.kernels.every_op import CALLS, CASES, VARIANTS, every_call
from tests.tools.calls import Call, as_tuple, columns_first, gradients_of, tensors_of, weights_of
from tests.tools.parity import GRADCHECK
from tests.tools.sanitizer import sanitize


def _assert_same(ops, got: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit, except PyTorch's GPU kernels, some of which sum in any order."""
    tolerance = None if ops is torch_ops and got[0].is_cuda else 0.0  # None: PyTorch's default
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------- checkpointing

_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}


def _expensive_saved(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
    if op.namespace == "fastgpt" or op.overloadpacket in _PRODUCTS:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _all_recomputed(*_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


def _selective(policy: Callable) -> Callable:
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpoint, use_reentrant=False, context_fn=contexts)


CHECKPOINTS = {
    "without re-entry": partial(checkpoint, use_reentrant=False),
    "re-entrant": partial(checkpoint, use_reentrant=True),
    "selective, operators saved": _selective(_expensive_saved),
    "selective, all recomputed": _selective(_all_recomputed),
}


@every_call
@pytest.mark.parametrize("kind", CHECKPOINTS.values(), ids=CHECKPOINTS.keys())
def test_checkpointing_changes_no_number(ops, device: str, kind: Callable, call: Call) -> None:
    tensors = tensors_of(call, device)
    outcomes = []
    for run in (lambda f, *args: f(*args), kind):
        torch.manual_seed(1)
        out = as_tuple(run(lambda *args: call.run(ops, *args), *tensors))
        outcomes.append([*(y.detach().clone() for y in out), *gradients_of(out, tensors)])
    _assert_same(ops, *outcomes)


# ----------------------------------------------------------------------- in-place changes


@every_call
def test_results_may_be_changed_in_place(ops, device: str, call: Call) -> None:
    """Gradients equal those of an out-of-place change; if backward needs the result, PyTorch
    raises."""
    tensors = tensors_of(call, device)
    n_outputs = len(as_tuple(call.run(ops, *tensors)))
    for k in range(n_outputs):
        torch.manual_seed(1)
        out = list(as_tuple(call.run(ops, *tensors)))
        out[k] = out[k] * 2.0 + 1.0
        expected = gradients_of(tuple(out), tensors)
        torch.manual_seed(1)
        out = list(as_tuple(call.run(ops, *tensors)))
        out[k].mul_(2.0).add_(1.0)
        try:
            gradients = gradients_of(tuple(out), tensors)
        except RuntimeError as error:
            assert CASES[call.op].needed == k
            assert "modified by an inplace operation" in str(error)
        else:
            _assert_same(ops, gradients, expected)


# ------------------------------------------------------------------- determinism, frozen tensors


def _in_bfloat16(call: Call) -> Call:
    def run(ops, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(tensors[0].device.type, torch.bfloat16):
            return call.run(ops, *tensors)

    return call._replace(run=run)


ALL = CALLS | VARIANTS
AUTOCAST = {
    f"{name}, autocast": _in_bfloat16(call)
    for name, call in CALLS.items()
    if "dropout" not in name and "odd" not in name
}


@pytest.mark.parametrize("name", [name for name, call in ALL.items() if call.several])
def test_two_runs_give_the_same_bits(device: str, name: str) -> None:
    """Interpreted, the two runs differ in the order of the programs."""
    call = ALL[name]
    assert call.several is not None
    dtype, shapes = call.several
    tensors = [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]
    runs = []
    for order in (1, 2):
        torch.manual_seed(1)
        with sanitize(order):
            out = as_tuple(call.run(fused, *tensors))
            runs.append([*(y.detach() for y in out), *gradients_of(out, tensors)])
    assert all(map(torch.equal, *runs))


class _Operators(TorchDispatchMode):
    """Records the last call of each of our operators for each combination of argument types."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, list[Any], bool]] = {}
        self.differentiated = False  # whether forward operators are differentiated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastgpt":
            kinds = [x.dtype if isinstance(x, Tensor) else x for x in args]
            copies = [x.clone() if isinstance(x, Tensor) else x for x in args]
            forward = self.differentiated and "_bwd" not in func._opname
            self.calls[f"{func} {kinds}"] = func, copies, forward
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("call", [*ALL.values(), *AUTOCAST.values()], ids=[*ALL, *AUTOCAST])
def test_whichever_gradients_are_wanted(ops, device: str, call: Call) -> None:
    """All but one tensor are frozen, or only one: exactly the needed gradients are computed, with
    the values of the full backward. All operators called pass PyTorch's own checks."""
    n = len(call.shapes)
    tensors = [x.detach() for x in tensors_of(call, device)]
    if ops is fused:  # sums in PyTorch's own products depend on the layout
        tensors = [columns_first(x) for x in tensors]
    alone = [[i == k for i in range(n)] for k in range(n)]
    expected: list[Tensor] = []
    with _Operators() as operators:
        assert not any(y.requires_grad for y in as_tuple(call.run(ops, *tensors)))
        operators.differentiated = True
        for wanted in ([True] * n, *alone, *([not w for w in one] for one in alone if n > 2)):
            torch.manual_seed(1)
            leaves = [x.clone().requires_grad_(w) for x, w in zip(tensors, wanted, strict=True)]
            out = [y for y in as_tuple(call.run(ops, *leaves)) if y.requires_grad]
            torch.autograd.backward(out, [columns_first(y.detach()) for y in out])
            expected = expected or [x.grad for x in leaves if x.grad is not None]
            assert [x.grad is not None for x in leaves] == wanted
            got = [x.grad for x in leaves if x.grad is not None]
            _assert_same(ops, got, [g for g, w in zip(expected, wanted, strict=True) if w])
    for op, args, differentiated in operators.calls.values():
        for x in args:
            if isinstance(x, Tensor) and x.is_floating_point() and differentiated:
                x.requires_grad_()
        torch.library.opcheck(op, args)


# ------------------------------------------------------------------ first and second derivatives


@pytest.mark.parametrize("call", ALL.values(), ids=ALL)
def test_gradcheck(call: Call) -> None:
    """In float64, which only the interpreter supports."""

    def run(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        torch.manual_seed(1)  # dropout
        return call.run(fused, *tensors)

    tensors = [x.detach().double().requires_grad_() for x in tensors_of(call, "cpu")]
    assert torch.autograd.gradcheck(run, tensors, **GRADCHECK)


def _second_derivatives(ops, call: Call, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the sum of squares of all leaves' gradients."""
    torch.manual_seed(1)
    tensors = [x.clone().requires_grad_() for x in leaves]
    out = as_tuple(call.run(ops, *tensors))
    grads = [grad.requires_grad_() for grad in weights_of(out)]
    first = torch.autograd.grad(out, tensors, grads, create_graph=True)
    total = torch.stack([(x * x).sum() for x in first]).sum()
    return list(torch.autograd.grad(total, [*tensors, *grads], materialize_grads=True))


@every_call
def test_second_derivatives_are_right_or_refused(ops, device: str, call: Call) -> None:
    """No kernel has one; every op raises the same message, PyTorch's SDPA its own."""
    leaves = [torch.randn(shape, device=device) for shape in call.shapes]
    if ops is fused or call.op == "linear_cross_entropy":
        # With recomputation, the LayerNorm that produced the input raises first.
        message = rf"^.*\b({call.op}|residual_layer_norm)\b.* has no second derivative: "
        with pytest.raises(RuntimeError, match=message):
            _second_derivatives(ops, call, leaves)
        return
    try:
        got = _second_derivatives(ops, call, leaves)
    except RuntimeError as error:
        assert "scaled_dot_product" in str(error) and "not implemented" in str(error)
    else:
        expected = _second_derivatives(reference, call, leaves)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
