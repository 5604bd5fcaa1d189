"""The forward or backward pass of one op call: running it and checking its results."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgpt.devices import autocast
from fastgpt.kernels import configs, torch_ops
from fastgpt.kernels.configs import Key
from fastgpt.tuning.workload import Call, mapped, tensors_in


class Phase:
    """The forward or backward pass of a call, with which entries of the launch tables are timed."""

    def __init__(self, call: Call, count: int, backward: bool, ops: ModuleType) -> None:
        self.call, self.count, self.backward, self._ops = call, count, backward, ops
        inputs = tensors_in((call.args, call.kwargs))
        self.device = inputs[0].device
        self.drops = call.kwargs.get("seed") is not None
        self._leaves = [x for x in inputs if x.requires_grad]
        self._grads: list[Tensor] = []  # of the outputs

    def __str__(self) -> str:
        return f"{self.call} {'backward' if self.backward else 'forward'}"

    def prepared(self) -> Callable[[], Any]:
        """The pass as a function. For a backward, the forward has already been computed."""
        if not self.backward:
            return self._forward
        outputs = self._forward()
        grads = self._out_grads(outputs)
        return lambda: torch.autograd.grad(outputs, self._leaves, grads, allow_unused=True)

    def run(self) -> None:
        """Compute the pass, for a backward including the forward."""
        self.prepared()()

    def _forward(self) -> list[Tensor]:
        call = self.call
        with autocast(self.device, call.dtype):
            return tensors_in(getattr(self._ops, call.op)(*call.args, **call.kwargs))

    def _out_grads(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the outputs, the same in every run."""
        if not self._grads:
            self._grads = gradients_like(outputs)
        return self._grads

    def check(self, expected: "Expected") -> None:
        """Raise AssertionError if an output or gradient of our op, as it is now, is inaccurate."""
        expected.check(_results(self.call, self._ops, None, self._grads))

    def expected(self) -> "Expected":
        """The values that ``check`` compares with. PyTorch cannot reproduce our dropout masks, so
        with dropout our op in its current configuration replaces PyTorch's."""
        plain = self._ops if self.drops else torch_ops
        grads = self._out_grads(self._forward())
        values = _results(self.call, plain, torch.float32, grads)
        own = _results(self.call, self._ops, None, grads)
        others = _results(self.call, plain, None, grads)
        # Under autocast some of PyTorch's ops return float32 where ours return the model's dtype.
        rounded = [x.to(y.dtype) for x, y in zip(others, own, strict=True)]
        return Expected.of(values, rounded, [_rtol(x.dtype) for x in own])


class Expected(NamedTuple):
    """Outputs and gradients in a wide dtype, and the allowed RMS error of each."""

    values: list[Tensor]
    limits: list[float]

    @classmethod
    def of(cls, values: list[Tensor], others: list[Tensor], rtols: Sequence[float]) -> "Expected":
        """Allow twice the error of ``others``, plus the fraction ``rtols`` of each value's RMS."""
        errors, sizes = _rms_errors(others, values), [_rms(x) for x in values]
        limits = [2 * e + t * x for e, t, x in zip(errors, rtols, sizes, strict=True)]
        return cls(values, limits)

    def check(self, found: Sequence[Tensor]) -> None:
        """Raise AssertionError if the error of a tensor exceeds its limit."""
        errors = _rms_errors(found, self.values)
        for number, (error, limit) in enumerate(zip(errors, self.limits, strict=True)):
            if not error <= limit:
                raise AssertionError(
                    f"result {number} errs by {error:.3g}, allowed are {limit:.3g}"
                )


def _rtol(dtype: torch.dtype) -> float:
    """1e-5, or the error of one element in 10,000 being rounded the other way if that is larger:
    PyTorch's AdamW rounds exactly as expected, which would leave no tolerance."""
    return max(1e-5, 0.01 * torch.finfo(dtype).eps)


def _results(
    call: Call, ops: ModuleType, dtype: torch.dtype | None, out_grads: list[Tensor]
) -> list[Tensor]:
    """Outputs, then gradients, in ``dtype``, or if None with the dtypes of the model's call."""

    def op(*args: Any, **kwargs: Any) -> Any:
        with autocast(tensors_in(args)[0].device, dtype or call.dtype):
            return getattr(ops, call.op)(*args, **kwargs)

    wide = None if call.op == "adamw" else dtype  # the dtypes of its state are fixed
    return results(op, call.args, call.kwargs, wide, out_grads)


def results(
    op: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype | None,
    out_grads: Sequence[Tensor],
) -> list[Tensor]:
    """Outputs, then the gradients of inputs that require one, without TF32 in float32 products.

    Args:
        args: copied first, like ``kwargs``.
        dtype: dtype of the copies of floating-point tensors; None keeps theirs.
        out_grads: gradients of the outputs. If empty, as for an op that writes to its arguments,
            no gradients are computed.
    """

    def copied(x: Tensor) -> Tensor:
        to = dtype if dtype is not None and x.is_floating_point() else x.dtype
        return x.detach().to(to, copy=True).requires_grad_(x.requires_grad)

    args, kwargs = mapped(copied, args), mapped(copied, kwargs)
    inputs = tensors_in((args, kwargs))
    with _exact_products(), torch.set_grad_enabled(bool(out_grads)):
        outputs = tensors_in(op(*args, **kwargs))
        if not outputs:
            return inputs
        if not out_grads:
            return outputs
        leaves = [x for x in inputs if x.requires_grad]
        grads = [g.to(x.dtype) for g, x in zip(out_grads, outputs, strict=True)]
        found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return [x.detach() for x in (*outputs, *found) if x is not None]


def gradients_like(outputs: Sequence[Tensor]) -> list[Tensor]:
    """A random gradient per output; 1 for a scalar loss."""
    return [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in outputs]


@contextmanager
def _exact_products() -> Iterator[None]:
    """Within the block, float32 products do not use TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _rms_errors(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [_rms(x.to(y.dtype) - y) for x, y in zip(found, expected, strict=True)]


def _rms(x: Tensor) -> float:
    return float(x.to(torch.promote_types(x.dtype, torch.float32)).square().mean().sqrt())


class _RecordingTable(dict[Key, Any]):
    """A table that records which keys are looked up. Truthy even if empty, because
    ``configs.find`` skips a falsy table."""

    def __init__(self, lines: Mapping[Key, Any]) -> None:
        super().__init__(lines)
        self.asked: list[Key] = []

    def __bool__(self) -> bool:
        return True

    def get(self, key: Any, default: Any = None) -> Any:
        self.asked.append(Key(*key))
        return super().get(key, default)


def asked_by(phase: Phase) -> list[Key]:
    """The keys that a phase looks up, each once."""
    lines = configs.tuned(phase.device)
    work = phase.prepared()
    recording = _RecordingTable(lines)
    configs.use_tuned(phase.device, recording)
    try:
        work()
    finally:
        configs.use_tuned(phase.device, lines)
    return list(dict.fromkeys(recording.asked))
