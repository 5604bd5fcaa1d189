"""``Cases``: an op's inputs for the checks shared by all ops, defined in the op's test file."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.kernels import fused, reference
from tests.tools import parity
from tests.tools.draws import Drawn, Draws

Shapes = Sequence[tuple[int, ...]]
Results = Tensor | tuple[Tensor, ...]
Masks = tuple[Tensor, Tensor]


class Call(NamedTuple):
    """An op with some of its options: ``run(ops, *tensors)`` on tensors of ``shapes``, all of which
    get a gradient. Other shapes for them:

    empty: each has a size of 0.
    single: one row or column, which PyTorch calls contiguous whatever its strides.
    several: dtype and shapes for which several programs or row blocks contribute to a sum.
    """

    shapes: Shapes
    run: Callable[..., Results]
    empty: Sequence[Shapes] = ()
    single: Shapes | None = None
    several: tuple[torch.dtype, Shapes] | None = None
    op: str = ""  # set by ``tests.kernels.every_op``


class Compiled(NamedTuple):
    """A check of kernels compiled for some architectures."""

    name: str
    run: Callable[[], None]
    sm: Sequence[int]


def compiled(
    name: str, run: Callable[..., None], *args: Any, sm: Sequence[int] = (75, 80, 90), **kwargs: Any
) -> Compiled:
    return Compiled(name, partial(run, *args, **kwargs), sm)


class Cases(NamedTuple):
    """Test inputs of one op.

    valid: arguments that every implementation accepts.
    refused: regular expression of a ValueError → changed arguments that raise it. Wrong types,
        dtypes and devices of tensors need no entry.
    compiled: a minimal set that compiles both ways of each branch of its kernels, in each dtype.
    calls: by options, "" for none; empty if the op has no gradient.
    drawn: a call and its tensors, drawn by hypothesis; None if ``test_properties`` has its own.
    variants: more calls, for the checks of operators and derivatives.
    masks: ``masks(n_rows, n_cols, device, **options)`` returns which elements forward and backward
        keep, if the op has its own dropout mask.
    needed: index of the result that backward needs, if any.
    """

    op: str
    valid: Mapping[str, Any]
    refused: Mapping[str, dict[str, Any]]
    compiled: Sequence[Compiled]
    calls: Mapping[str, Call]
    drawn: Callable[[Draws], Drawn] | None
    variants: Mapping[str, Call] = {}
    masks: Callable[..., Masks] | None = None
    needed: int | None = None


def ids(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def places(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def tensors_of(call: Call, device: str, *batch: int) -> list[Tensor]:
    return [torch.randn(*batch, *s, device=device, requires_grad=True) for s in call.shapes]


def as_tuple(out: Results) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def columns_first(x: Tensor) -> Tensor:
    """The same values with the last two dimensions swapped in memory, if there are two."""
    return x.mT.contiguous().mT if x.dim() > 1 else x


def weights_of(out: tuple[Tensor, ...]) -> list[Tensor]:
    """Incoming gradients for the results, with distinct elements."""
    return [torch.linspace(-1.0, 1.0, y.numel(), device=y.device).view_as(y) for y in out]


def gradients_of(out: tuple[Tensor, ...], tensors: list[Tensor]) -> list[Tensor]:
    torch.autograd.backward(out, weights_of(out))
    gradients = []
    for x in tensors:
        assert x.grad is not None
        gradients.append(x.grad)
        x.grad = None
    return gradients


def compare(call: Callable[..., Tensor], dtype: torch.dtype, *shapes: tuple[int, ...]) -> None:
    """Assert parity of ``call(ops, *tensors)`` on the kernels and on the plain ops."""
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    kernel, plain = (partial(call, module) for module in (fused, reference))
    shape = plain(*inputs).shape
    grad = torch.randn(shape).to(dtype) if shape else torch.tensor(1.0)
    names = [f"input {i}" for i in range(len(inputs))]
    parity.assert_parity(kernel, plain, plain, inputs, grad, names)


def with_seed(options: dict[str, Any]) -> dict[str, Any]:
    seed = {"seed": torch.tensor([0x1234_5678_9ABC_DEF])}
    return options | (seed if "dropout_p" in options else {})
