"""The parity rule for every op: error(kernel) <= 2 * error(PyTorch) + 1e-5.

Both errors are deviations from the plain op in float64 on the same inputs, for the output and each
gradient. PyTorch computes in the kernel's dtype, on a CPU in a fixed way (``rounding``). The rule
applies to the root mean square and to the largest deviation; the latter is allowed one more
rounding of its element, since among a few hundred elements in half precision PyTorch's largest
error is a matter of luck.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tools.rounding import RoundedOnce

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "transposed", "strided", "offset"]

# The fast mode compares one sum of all derivatives, in which errors of a few of them must show.
GRADCHECK: dict[str, Any] = dict(fast_mode=True, rtol=1e-6, atol=1e-9)


@contextmanager
def skipped_without_sdpa() -> Iterator[None]:
    """PyTorch's SDPA in bfloat16 fails if ATEN_CPU_CAPABILITY is below the CPU's."""
    try:
        yield
    except RuntimeError as error:
        if "pack_vnni2" not in str(error):
            raise
        pytest.skip(f"PyTorch's SDPA: {error}")


def randn(shape: Sequence[int], dtype: torch.dtype, device: str, layout: str) -> Tensor:
    """N(0, 1) in a memory layout: dense; last two dimensions swapped; every second element of the
    last dimension; dense at an odd offset into a larger storage."""
    *outer, last = shape
    if layout == "transposed" and outer:
        base = torch.randn(*outer[:-1], last, outer[-1], dtype=torch.float32, device=device)
        return base.to(dtype).transpose(-2, -1)
    if layout == "strided":
        return torch.randn(*outer, 2 * last, device=device).to(dtype)[..., ::2]
    if layout == "offset":
        numel = torch.Size(shape).numel()
        return torch.randn(numel + 3, device=device).to(dtype)[3:].view(*shape)
    return torch.randn(*shape, device=device).to(dtype)


def outcome(op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output and, if it requires gradients, the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype)) if out.requires_grad else ()
    return [out.detach(), *gradients]


def results(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """``outcome`` computed in ``dtype``, returned in float64."""
    found = outcome(op, [x.to(dtype) for x in inputs], grad)  # keeps strides
    return [t.double() for t in found]


def assert_parity(
    kernel: Callable[..., Tensor],
    pytorch: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
    names: Sequence[str],
    few: bool = False,
) -> None:
    """Compare ``kernel`` and ``pytorch`` in the inputs' dtype with ``plain`` in float64. ``names``:
    input names for the message. ``few``: with few elements PyTorch's error may be 0 by luck, so
    the bound is raised by eight roundings of the case's largest value, about as many as an op has
    between an input and a gradient."""
    dtype = inputs[0].dtype
    got = results(kernel, inputs, grad, dtype)
    with RoundedOnce() if grad.is_cpu else nullcontext():
        common = results(pytorch, inputs, grad, dtype)
    truth = results(plain, inputs, grad.double(), torch.float64)
    if truth[0].numel() == 1:
        # A single number, such as a loss, may be close by luck. A kernel may call products of the
        # CPU's library, with its order of sums, so take the larger of the errors with and without.
        own = results(pytorch, inputs, grad, dtype)[0]
        common[0] = max(common[0], own, key=lambda y: float((y - truth[0]).abs()))
    largest = [float(t.abs().max()) for t in (*inputs, grad, *truth) if few and t.numel()]
    floor = 1e-5 + 8 * torch.finfo(dtype).eps * max(largest, default=0.0)
    for name, x, y, z in zip(
        ("output", *(f"d{n}" for n in names)), got, common, truth, strict=True
    ):
        assert x.shape == z.shape, f"{name}: shape {tuple(x.shape)}, not {tuple(z.shape)}"
        assert not x.isnan().any(), f"{name}: NaN, or memory that no kernel wrote"
        if z.numel() == 0:
            continue
        error, allowed = (x - z).abs(), 2 * (y - z).abs().max() + floor
        excess = (error - torch.finfo(dtype).eps * z.abs()).max()
        assert excess <= allowed, f"{name}: error {error.max():.3g}, allowed {allowed:.3g}"
        rms, allowed = _rms(x - z), 2 * _rms(y - z) + floor
        assert rms <= allowed, f"{name}: RMS error {rms:.3g}, allowed {allowed:.3g}"


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def saved_storages(run: Callable[[], Tensor]) -> dict[int, int]:
    """Storages that autograd saves in ``run()`` for backward: address → bytes."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    assert out.grad_fn is not None
    return kept
