"""Registration of ops as PyTorch operators, at little cost to the host on each call.

An operator becomes what ``torch.library.custom_op`` and ``register_autograd`` would make of it, by
the same dispatch keys: ``torch.compile``, ``opcheck`` and the FLOP counter treat it alike. Those
two wrap each call in Python code for operators of any kind. Left out is what serves default values,
lists of tensors among the arguments, and results that alias an argument, which no operator here
has. Operators that write to an argument are registered by ``custom_op``.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._library.utils import get_layout_constraint_tag
from torch._ops import OpOverload

_library = torch.library.Library("fastgpt", "FRAGMENT")
_formulas: dict[OpOverload, "_Formula"] = {}


class _Formula:
    """How one operator is differentiated. Those named ``OP_bwd...``, which compute the gradient of
    OP, are not."""

    def __init__(self, op: OpOverload) -> None:
        self._op = op

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        name, _, _ = self._op._opname.partition("_bwd")
        raise RuntimeError(
            f"{name} has no second derivative: a kernel computes its gradient, which autograd "
            "cannot differentiate; the ops of fastgpt.kernels.reference have derivatives of any "
            "order"
        )


def operator(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorates the implementation of ``fastgpt::name`` for tensors on any device. All its results
    are new tensors. ``schema`` is inferred from the annotations by default."""

    def register(implementation: Callable[..., Any]) -> OpOverload:
        inferred = schema or torch.library.infer_schema(implementation, mutates_args=())
        _library.define(name + inferred, tags=torch.Tag.pt2_compliant_tag)
        op: OpOverload = getattr(torch.ops.fastgpt, name).default
        # A frame that Dynamo meets while it is active must not be compiled: it launches kernels.
        launches = torch._disable_dynamo(implementation)
        _library.impl(name, launches, "CompositeExplicitAutograd")
        _formulas[op] = _Formula(op)
        kernel = _with_autograd(op, launches, _formulas[op])
        _library.impl(name, kernel, "Autograd", with_keyset=True)
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


# Up to PyTorch 2.12 Inductor describes an operator that it does not know, with all that leads to
# it, for a log that is off. In GPT two ways lead from each layer to the next: 12 blocks take hours.
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
    ``backward(ctx, *grads)``, with one gradient per result, returns the inputs' gradients from."""
    formula: Any = _formulas[op]
    formula.setup_context, formula.backward = setup_context, backward


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

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return (*formula.backward(ctx, *grads), None)  # None: of the keyset

    methods = dict(forward=staticmethod(forward), backward=staticmethod(backward))
    name = f"GeneratedBackwardFor_fastgpt_{op._opname}_default"  # as custom_op names it
    node: Any = type(name, (torch.autograd.Function,), methods)

    def kernel(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            output = node.apply(*inputs, keyset)
            return list(output) if returns_list else output
        return run(keyset, inputs)

    return kernel
