"""AdamW in Triton against ``torch.optim.AdamW`` and the plain op."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, ones, zeros

from fastgpt.kernels import fused, reference, torch_ops
from fastgpt.kernels.adamw import _adamw_op
from tests.tools.calls import Cases, compiled

OPTIONS: dict[str, Any] = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
SIZES = [1, 7, 1024, 3001]


class Buffers:
    """Optimizer state of N elements, updated by one of the implementations."""

    def __init__(self, param: Tensor, rounded: torch.dtype | None = None) -> None:
        self.param = param.clone()
        self.rounded = None if rounded is None else torch.zeros_like(param, dtype=rounded)
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
        self.step = torch.zeros((), device=param.device)

    def update(self, module: Any, grad: Tensor, lr: float, **changes: Any) -> None:
        lr_tensor = torch.tensor(lr, device=grad.device)
        module.adamw(
            self.param, self.rounded, grad, self.exp_avg, self.exp_avg_sq, self.step, lr_tensor,
            **{**OPTIONS, **changes},
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        return [self.param, self.exp_avg, self.exp_avg_sq, self.step]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.5)], ids=str)
def test_parity(device: str, n: int, betas: tuple[float, float]) -> None:
    """Ten updates; errors against float64 are bounded by those of PyTorch's own optimizer."""
    torch.manual_seed(n)
    start = torch.randn(n, device=device)
    gradients = [torch.randn(n, device=device) * 10.0 ** (i % 3 - 2) for i in range(10)]
    ours = Buffers(start)
    own = torch.nn.Parameter(start.clone())
    truth = torch.nn.Parameter(start.double())
    options = {**OPTIONS, "betas": betas}
    optimizers = [
        torch.optim.AdamW([own], lr=0.0, fused=True, **options),
        torch.optim.AdamW([truth], lr=0.0, **options),
    ]
    for i, grad in enumerate(gradients):
        lr = 1e-3 * (i + 1)
        ours.update(fused, grad, lr, betas=betas)
        for optimizer in optimizers:
            (weight,) = optimizer.param_groups[0]["params"]
            weight.grad = grad.to(weight.dtype)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
    expected, moments = optimizers[1].state[truth], optimizers[0].state[own]
    for got, common, exact in (
        (ours.param, own, truth),
        (ours.exp_avg, moments["exp_avg"], expected["exp_avg"]),
        (ours.exp_avg_sq, moments["exp_avg_sq"], expected["exp_avg_sq"]),
    ):
        error = (got.double() - exact).abs().max()
        assert error <= 2 * (common.double() - exact).abs().max() + 1e-7
    assert ours.step.item() == 10


@pytest.mark.parametrize("module", [fused, torch_ops, reference])
def test_a_skipped_update_changes_nothing(device: str, module: Any) -> None:
    start = torch.randn(50, device=device)
    state = Buffers(start, torch.bfloat16)
    go_on, skip = torch.zeros((), device=device), torch.ones((), device=device)
    state.update(module, start, 1e-2, skip=go_on)
    before = [t.clone() for t in state.tensors()]
    assert state.rounded is not None
    rounded = state.rounded.clone()
    state.update(module, start * math.nan, 1e-2, skip=skip)
    assert all(map(torch.equal, state.tensors(), before))
    assert torch.equal(state.rounded, rounded)
    assert state.step.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("module", [fused, torch_ops], ids=["fused", "torch_ops"])
def test_accumulate(device: str, module: Any, dtype: torch.dtype) -> None:
    """Gradients with any strides are added to unaligned buffers, bit for bit."""
    torch.manual_seed(0)
    shapes = [(1030,), (0,), (3, 5), (7, 300)]
    flat = [torch.randn(3 + math.prod(shape), device=device) for shape in shapes]
    totals = [x[3:].view(shape) for x, shape in zip(flat, shapes, strict=True)]
    grads = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    grads[-1] = grads[-1].t().contiguous().t()
    expected = [total + grad.float() for total, grad in zip(totals, grads, strict=True)]
    before = [x[:3].clone() for x in flat]
    module.accumulate(totals, grads)
    assert all(map(torch.equal, totals, expected))
    assert all(map(torch.equal, before, [x[:3] for x in flat]))


def test_nothing_to_update(device: str) -> None:
    Buffers(torch.zeros(0, device=device)).update(fused, torch.zeros(0, device=device), 1e-3)


def test_opcheck(device: str) -> None:
    state, grad = Buffers(torch.randn(1030, device=device), torch.bfloat16), torch.randn(1030)
    args = (state.param, state.rounded, grad.to(device), state.exp_avg, state.exp_avg_sq)
    scalars = (state.step, torch.tensor(1e-3, device=device), (0.9, 0.95), 1e-8, 0.1, None, None)
    torch.library.opcheck(_adamw_op, (*args, *scalars))


# --------------------------------------------------------------------- the checks of every op


def _compare(rounded: torch.dtype | None, controlled: bool, betas: tuple[float, float]) -> None:
    """Three updates; with ``controlled`` they are clipped and the second one is skipped."""
    start, grad = torch.randn(2, 1030)
    states = []
    for module in (fused, reference):
        state = Buffers(start, rounded)
        for k in range(3):
            control = dict(clip=torch.tensor(0.5), skip=torch.tensor(float(k == 1)))
            state.update(module, grad, 1e-2, betas=betas, **(control if controlled else {}))
        states.append(state)
        if state.rounded is not None:
            assert torch.equal(state.rounded, state.param.to(state.rounded.dtype))
    ours, plain = (state.tensors() for state in states)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def _accumulate(dtype: torch.dtype) -> None:
    total, grad = torch.randn(1030), torch.randn(1030).to(dtype)
    expected = total + grad.float()
    fused.accumulate([total], [grad])
    assert torch.equal(total, expected)


ADAMW = Cases(
    "adamw",
    valid=dict(
        **{name: ones(4) for name in ("param", "grad", "exp_avg", "exp_avg_sq")},
        **dict(rounded=None, step=zeros(()), lr=zeros(())),
        **OPTIONS,
    ),
    refused={
        r"exp_avg must have the shape \(N,\) of param, \(4,\)": dict(exp_avg=ones(5)),
        r"grad must .*contiguous, got \(4,\), strides \(2,\)": dict(grad=ones(8)[::2]),
        r"param must have .* got \(2, 2\)": dict(param=ones(2, 2)),
        r"lr must have shape \(\), contiguous, got \(1,\)": dict(lr=ones(1)),
        "clip must be on the device of param": dict(clip=ones((), device="meta")),
        r"betas\[1\] must lie in \[0, 1\), got 1.0": dict(betas=(0.9, 1.0)),
        "weight_decay must be at least 0 and finite, got -1": dict(weight_decay=-1),
    },
    compiled=[
        compiled("adamw-bfloat16", _compare, torch.bfloat16, True, (0.9, 0.95)),
        compiled("adamw-float16", _compare, torch.float16, False, (0.9, 0.95)),
        compiled("adamw-no-moments", _compare, None, False, (0.0, 0.0)),
        compiled("accumulate-bfloat16", _accumulate, torch.bfloat16),
        compiled("accumulate-float16", _accumulate, torch.float16),
    ],
    calls={},
    drawn=None,
)
