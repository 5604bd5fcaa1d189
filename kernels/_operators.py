"""Registration of ops as PyTorch operators, with little host overhead per call.

The result is the same as with ``torch.library.custom_op`` and ``register_autograd``, through the
same dispatch keys: ``torch.compile``, ``opcheck`` and the FLOP counter treat it alike. Those two
wrap each call in Python code that handles operators of any kind. This module omits support for
default values, lists of tensors as arguments, and results that alias an argument, which no operator
here needs. Operators that write to an argument are registered with ``custom_op``.

In addition, ``torch.func.grad``, ``vjp`` and ``vmap`` work, and forward-mode tangents raise an
error; ``custom_op`` drops them.
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
    """The derivative formula of one operator. Operators named ``OP_bwd...``, which compute the
    gradient of OP, keep the default, which raises an error."""

    def __init__(self, public_name: str) -> None:
        self.public_name = public_name  # for error messages

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        raise RuntimeError(
            f"{self.public_name} has no second derivative: a kernel computes its gradient, which "
            "autograd cannot differentiate; the ops of fastgpt.kernels.reference have derivatives "
            "of any order"
        )


def operator(
    name: str, schema: str | None = None, ops: str = ""
) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorate the implementation of ``fastgpt::name`` for tensors on any device. All its results
    must be new tensors. ``schema`` defaults to the one inferred from the annotations. ``ops``: the
    public names for error messages, by default the operator's."""

    def register(implementation: Callable[..., Any]) -> OpOverload:
        inferred = schema or torch.library.infer_schema(implementation, mutates_args=())
        _library.define(name + inferred, tags=torch.Tag.pt2_compliant_tag)
        op: OpOverload = getattr(torch.ops.fastgpt, name).default
        # Dynamo must not compile the implementation's frame: it launches kernels.
        launches = torch._disable_dynamo(implementation)
        _library.impl(name, launches, "CompositeExplicitAutograd")
        _formulas[op] = _Formula(ops or name.partition("_bwd")[0])
        kernel = _with_autograd(op, launches, _formulas[op])
        _library.impl(name, kernel, "Autograd", with_keyset=True)
        torch.library.register_vmap(f"fastgpt::{name}", _vmap_rule(op), lib=_library)
        return op

    return register


def fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the fake implementation, whose results have the right shapes, strides and dtypes."""

    def register(results: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(results)
        def traced(*args: Any) -> Any:
            if _INDUCTOR_LOGS_FALLBACKS:
                _make_known_to_inductor(op)
            return results(*args)

        decorator: Callable[..., Any] = torch.library.register_fake(op, lib=_library)
        return decorator(traced)

    return register


# For an unknown operator, Inductor before PyTorch 2.13 formats a description of all its ancestors,
# even if logging is off. In GPT two paths lead from each layer to the next, so two more blocks make
# this nine times as slow.
_INDUCTOR_LOGS_FALLBACKS = torch.__version__ < "2.13"


def _make_known_to_inductor(op: OpOverload) -> None:
    """Register a fallback while tracing, as Inductor itself would do later."""
    inductor: Any = sys.modules.get("torch._inductor.lowering")
    if inductor is not None and op not in inductor.lowerings:
        constraint = inductor.tag_to_layout_constraint(get_layout_constraint_tag(op))
        inductor.make_fallback(op, layout_constraint=constraint, warn=False)


def differentiable(
    op: OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Register the operator's backward. ``setup_context(ctx, inputs, output)`` saves tensors, from
    which ``backward(ctx, *grads)``, with one gradient per result, computes the gradients of the
    first inputs; the remaining inputs have none."""
    formula: Any = _formulas[op]
    formula.setup_context, formula.backward = setup_context, backward


def fill_none(gradients: Iterable[torch.Tensor], *wanted: bool) -> list[Any]:
    """One result per flag: the next of ``gradients`` if it is true, otherwise None."""
    rest = iter(gradients)
    return [next(rest) if want else None for want in wanted]


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd may need a gradient of one of ``tensors``. With gradients enabled, always
    true under a torch.func transform: a tensor batched by ``vmap`` never seems to require one."""
    if not torch.is_grad_enabled():
        return False
    if torch._C._are_functorch_transforms_active():
        return True
    return any(x is not None and x.requires_grad for x in tensors)


def _vmap_rule(op: OpOverload) -> Callable[..., Any]:
    """The operator's rule for ``torch.vmap``: call it for each element of the batch and stack the
    results. PyTorch's own fallback does the same, but does not support a list of tensors."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        if not info.batch_size:
            raise ValueError(
                f"vmap over {_formulas[op].public_name} must have a batch of at least 1, got 0"
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
    """The operator's kernel for the Autograd key, which records a graph node if one is needed."""
    returns_list = isinstance(op._schema.returns[0].type, torch.ListType)
    below_autograd = torch._C._after_ADInplaceOrView_keyset
    keys = torch._C.DispatchKey
    plain = {torch._C.DispatchKeySet(key).raw_repr() for key in (keys.CPU, keys.CUDA)}

    def run(keyset: Any, inputs: Any) -> Any:
        rest = keyset & below_autograd
        with torch._C._AutoDispatchBelowADInplaceOrView():  # no result is marked as a view
            if rest.raw_repr() in plain:  # no other dispatch key: skip the dispatcher
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
    name = f"GeneratedBackwardFor_fastgpt_{op._opname}_default"  # custom_op's name for it
    node: Any = type(name, (torch.autograd.Function,), methods)

    @torch.enable_grad()  # an outer transform may differentiate what this one computes
    def forward_in_transform(ctx: Any, *args: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):  # or have tangents, which are an error
            return forward(ctx, *args)

    # For torch.func transforms, which run this kernel at their own level.
    methods = {**methods, "forward": staticmethod(forward_in_transform)}
    in_transform: Any = type(name, (torch.autograd.function._SingleLevelFunction,), methods)

    def kernel(keyset: Any, *inputs: Any) -> Any:
        if forward_ad._current_level >= 0 and _has_tangent(inputs):
            raise NotImplementedError(
                f"{formula.public_name} has no forward-mode derivative (torch.func.jvp, jacfwd, "
                "dual tensors): use reverse mode, or the ops of fastgpt.kernels.reference"
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
