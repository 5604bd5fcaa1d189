"""Registration of ops as PyTorch operators, at little cost to the host on each call.

An operator becomes what ``torch.library.custom_op`` and ``register_autograd`` would make of it, by
the same dispatch keys: ``torch.compile``, ``opcheck`` and the FLOP counter treat it alike. Those
two wrap each call in Python code for operators of any kind. Left out is what serves default values,
lists of tensors among the arguments, and results that alias an argument, which no operator here
has. Operators that write to an argument are registered by ``custom_op``.

Beyond them, ``torch.func.grad``, ``vjp`` and ``vmap`` work, and a tangent of forward mode is an
error, where ``custom_op`` drops it.
"""

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.utils import get_layout_constraint_tag
from torch._ops import OpOverload
from torch.autograd import forward_ad

_library = torch.library.Library("fastgpt", "FRAGMENT")
_formulas: dict[OpOverload, "_Formula"] = {}


class _Formula:
    """How one operator is differentiated. Those named ``OP_bwd...``, which compute the gradient of
    OP, are not."""

    def __init__(self, called: str) -> None:
        self.called = called  # by a user

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        raise RuntimeError(
            f"{self.called} has no second derivative: a kernel computes its gradient, which "
            "autograd cannot differentiate; the ops of fastgpt.kernels.reference have derivatives "
            "of any order"
        )


def operator(
    name: str, schema: str | None = None, ops: str = ""
) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorates the implementation of ``fastgpt::name`` for tensors on any device. All its results
    are new tensors. ``schema`` is inferred from the annotations by default. ``ops``: for errors,
    what a user calls it by, if that is not its name."""

    def register(implementation: Callable[..., Any]) -> OpOverload:
        inferred = schema or torch.library.infer_schema(implementation, mutates_args=())
        _library.define(name + inferred, tags=torch.Tag.pt2_compliant_tag)
        op: OpOverload = getattr(torch.ops.fastgpt, name).default
        # A frame that Dynamo meets while it is active must not be compiled: it launches kernels.
        launches = torch._disable_dynamo(implementation)
        _library.impl(name, launches, "CompositeExplicitAutograd")
        _formulas[op] = _Formula(ops or name.partition("_bwd")[0])
        kernel = _with_autograd(op, launches, _formulas[op])
        _library.impl(name, kernel, "Autograd", with_keyset=True)
        torch.library.register_vmap(f"fastgpt::{name}", _one_by_one(op), lib=_library)
        return op

    return register


def fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates what gives the operator's results on fake tensors: shapes, strides, dtypes."""

    def register(results: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(results)
        def traced(*args: Any) -> Any:
            if _INDUCTOR_DESCRIBES:
                _make_known_to_inductor(op)
            return results(*args)

        decorator: Callable[..., Any] = torch.library.register_fake(op, lib=_library)
        return decorator(traced)

    return register


# PyTorch 2.11's Inductor describes an operator that it does not know, with all that leads to it,
# for a log that is off; 2.13's does not. In GPT two ways lead from each layer to the next, so that
# two blocks more take it nine times as long.
_INDUCTOR_DESCRIBES = torch.__version__ < "2.13"


def _make_known_to_inductor(op: OpOverload) -> None:
    """While tracing, before Inductor meets the operator; as Inductor itself does it then."""
    inductor: Any = sys.modules.get("torch._inductor.lowering")
    if inductor is not None and op not in inductor.lowerings:
        constraint = inductor.tag_to_layout_constraint(get_layout_constraint_tag(op))
        inductor.make_fallback(op, layout_constraint=constraint, warn=False)


def differentiable(
    op: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Gives the operator its gradient: ``setup_context(ctx, inputs, output)`` saves what
    ``backward(ctx, *grads)``, with one gradient per result, returns the inputs' gradients from; the
    inputs behind them have none."""
    formula: Any = _formulas[op]
    formula.setup_context, formula.backward = setup_context, backward


def spread(gradients: Iterable[torch.Tensor], *wanted: bool) -> list[Any]:
    """``gradients``, each at the place of one that is wanted; None at the other places."""
    rest = iter(gradients)
    return [next(rest) if want else None for want in wanted]


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd may differentiate by one of ``tensors``. A transform of torch.func hides
    whether it does: a tensor with a dimension of ``vmap`` never seems to require a gradient."""
    if not torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(x is not None and x.requires_grad for x in tensors)


def _one_by_one(op: OpOverload) -> Callable[..., Any]:
    """The operator's rule for ``torch.vmap``: a call for each element of the batch, and the results
    stacked. PyTorch's own fallback, which does the same, refuses a list of tensors."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise ValueError(
                f"vmap over {_formulas[op].called} must have a batch of at least 1, got 0"
            )
        calls = [
            op(
                *(
                    a if dim is None else a.select(dim, i)
                    for a, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(calls[0], torch.Tensor):
            return torch.stack(calls), 0
        results = [torch.stack(tensors) for tensors in zip(*calls, strict=True)]
        return (
            (results, [0] * len(results))
            if isinstance(calls[0], list)
            else (tuple(results), (0,) * len(results))
        )

    return rule


def _has_tangent(inputs: tuple[Any, ...]) -> bool:
    return any(
        isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None
        for x in inputs
    )


def _with_autograd(
    op: OpOverload, implementation: Callable[..., Any], formula: _Formula
) -> Callable[..., Any]:
    """The operator's kernel for the key Autograd: a node of the graph where one is needed."""
    returns_list = isinstance(op._schema.returns[0].type, torch.ListType)
    below_autograd = torch._C._after_ADInplaceOrView_keyset
    keys = torch._C.DispatchKey
    plain = {torch._C.DispatchKeySet(key).raw_repr() for key in (keys.CPU, keys.CUDA)}

    def run(keyset: Any, inputs: Any) -> Any:
        rest = keyset & below_autograd
        with torch._C._AutoDispatchBelowADInplaceOrView():  # no result is marked as a view
            if rest.raw_repr() in plain:  # nothing between here and the implementation
                return implementation(*inputs)
            return op.redispatch(rest, *inputs)

    def forward(ctx: Any, *args: Any) -> Any:
        inputs, keyset = args[:-1], args[-1]
        output = run(keyset, inputs)
        formula.setup_context(ctx, inputs, output)
        return tuple(output) if returns_list else output

    n_inputs = len(op._schema.arguments) + 1  # and the keyset

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        found = formula.backward(ctx, *grads)
        return (*found, *(None,) * (n_inputs - len(found)))

    methods = dict(forward=staticmethod(forward), backward=staticmethod(backward))
    name = f"GeneratedBackwardFor_fastgpt_{op._opname}_default"  # as custom_op names it
    node: Any = type(name, (torch.autograd.Function,), methods)

    @torch.enable_grad()  # the transform outside may differentiate what this one computes
    def forward_in_transform(ctx: Any, *args: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):  # or see that it has a tangent
            return forward(ctx, *args)

    # For a transform of torch.func, which runs this kernel at its own level.
    methods = {**methods, "forward": staticmethod(forward_in_transform)}
    in_transform: Any = type(name, (torch.autograd.function._SingleLevelFunction,), methods)

    def kernel(keyset: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and _has_tangent(inputs):
            raise NotImplementedError(
                f"{formula.called} has no forward-mode derivative (torch.func.jvp, jacfwd, dual "
                "tensors): use reverse mode, or the ops of fastgpt.kernels.reference"
            )
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            return run(keyset, inputs)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                output = in_transform.apply(*inputs, keyset)
        else:
            output = node.apply(*inputs, keyset)
        return list(output) if returns_list else output

    return kernel
