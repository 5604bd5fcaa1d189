"""Our ops on PyTorch's own sample inputs (OpInfo, in its wheel) for the functions they replace,
against those functions in float64 by the rule of ``parity``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import torch_ops
from tests.tools.parity import DTYPES, assert_parity


class Case(NamedTuple):
    ours: Callable[..., Tensor]
    pytorch: Callable[..., Tensor]
    inputs: list[Tensor]


def _layer_norm(ops: Any, sample: Any) -> Case | None:
    shape, *vectors = sample.args
    rows = sample.input.flatten(-len(shape))
    if not vectors or sample.kwargs.get("eps", 1.0) <= 0.0:
        return None  # our op always has a weight
    if rows.shape[-1] == 1 and ops is torch_ops:
        return None  # PyTorch's own kernel does not subtract the mean exactly
    vectors = [v.flatten() for v in vectors]
    return Case(
        lambda x, *v: ops.layer_norm(x, *v, **sample.kwargs),
        lambda x, *v: F.layer_norm(x, x.shape[-1:], *v, **sample.kwargs),
        [rows, *vectors],
    )


def _gelu(ops: Any, sample: Any) -> Case:
    return Case(
        lambda x: ops.gelu(x, **sample.kwargs), lambda x: F.gelu(x, **sample.kwargs), [sample.input]
    )


def _linear(ops: Any, sample: Any) -> Case:
    def rows(x: Tensor, *parameters: Tensor) -> Tensor:  # ``RoundedOnce`` lacks products of vectors
        return F.linear(x[None], *parameters)[0]

    pytorch = rows if sample.input.dim() == 1 else F.linear
    return Case(ops.linear, pytorch, [sample.input, *sample.args])


def _embedding(ops: Any, sample: Any) -> Case | None:
    if sample.kwargs:
        return None  # options that our op lacks
    (idx,) = sample.args
    idx = idx.reshape(1, -1)
    position = sample.input.new_zeros(idx.shape[1], sample.input.shape[1])
    return Case(
        lambda token, position: ops.embedding(idx, token, position),
        lambda token, position: F.embedding(idx, token) + position,
        [sample.input, position],
    )


def _cross_entropy(ops: Any, sample: Any) -> Case | None:
    """The sample's logits as their product with an identity matrix."""
    (targets,), options = sample.args, dict(sample.kwargs)
    if targets.is_floating_point() or "weight" in options or options.get("reduction") == "none":
        return None  # not in our op
    options.setdefault("ignore_index", -100)
    logits = sample.input.movedim(1, -1).flatten(0, -2)
    targets = targets.flatten()
    return Case(
        lambda x, w: ops.linear_cross_entropy(x, w, targets, **options),
        lambda x, w: F.cross_entropy(
            F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)), targets, **options
        ),
        [logits, torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)],
    )


def _attention(ops: Any, sample: Any) -> Case | None:
    options = dict(sample.kwargs)
    if options.pop("dropout_p", 0.0) or options.pop("enable_gqa", False) or "attn_mask" in options:
        return None  # dropout masks differ; equal head counts only; our op takes no mask
    q, k, v = (x if x.dim() == 4 else x.unsqueeze(1) for x in (sample.input, *sample.args))
    q = q.expand(*k.shape[:2], *q.shape[2:])
    causal = options.pop("is_causal", False)
    return Case(
        lambda q, k, v: ops.attention(q, k, v, causal=causal, **options),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, **options),
        [q, k, v],
    )


# PyTorch's name → conversion of a sample into a call of our op, minimum number of samples
OPS: dict[str, tuple[Callable[[Any, Any], Case | None], int]] = {
    "layer_norm": (_layer_norm, 2),
    "gelu": (_gelu, 2),
    "linear": (_linear, 18),
    "embedding": (_embedding, 3),
    "cross_entropy": (_cross_entropy, 6),
    "scaled_dot_product_attention": (_attention, 4),
}


def _shapes(sample: Any) -> list[Any]:
    return [getattr(x, "shape", x) for x in (sample.input, *sample.args)]


@pytest.fixture(scope="module")
def database() -> dict[str, Any]:
    """PyTorch's OpInfos by name."""
    with pytest.MonkeyPatch.context() as patch:
        # Meant for PyTorch's tests; here it would keep trainers in this process from enabling TF32.
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        common = pytest.importorskip(
            "torch.testing._internal.common_methods_invocations", reason="needs expecttest"
        )
    assert not torch.backends.flags_frozen()
    return {op.name: op for op in common.op_db}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_pytorchs_samples(
    database: dict[str, Any], ops: Any, device: str, name: str, dtype: torch.dtype
) -> None:
    make, expected = OPS[name]
    samples = database[f"nn.functional.{name}"].sample_inputs(device, dtype, requires_grad=False)
    # Many differ only in their values.
    samples = {str((_shapes(sample), sample.kwargs)): sample for sample in samples}.values()
    cases = [case for case in (make(ops, sample) for sample in samples) if case is not None]
    assert len(cases) >= expected
    for count, case in enumerate(cases):
        grad = torch.randn_like(case.pytorch(*case.inputs))
        names = [f"input {i} of sample {count}" for i in range(len(case.inputs))]
        assert_parity(case.ours, case.pytorch, case.pytorch, case.inputs, grad, names)
