"""Edge cases of chunked linear + cross-entropy: invalid and ignored targets, extreme logits, no
rows, memory, addresses beyond 2^31.
"""

import math
import mmap
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastgpt.kernels import chunked_loss, linear_cross_entropy, reference, torch_ops
from tests.tools import parity
from tests.tools.interpreter import Builder, Observer, Program
from tests.tools.sanitizer import exchanged

CHUNK = 8


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "chunk_rows", lambda n_cols, dtype, device: CHUNK)


def inputs(rows: int, width: int, n_classes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, width, device=device, requires_grad=True)
    weight = torch.randn(n_classes, width, device=device, requires_grad=True)
    return x, weight, torch.randint(n_classes, (rows,), device=device)


def outcome(
    ops: ModuleType, x: Tensor, weight: Tensor, targets: Tensor, **options: Any
) -> list[Tensor]:
    """Loss, dx and dweight."""
    loss = ops.linear_cross_entropy(x, weight, targets, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (x, weight))]


def test_all_targets_ignored(ops, device: str, small_chunks) -> None:
    x, weight, targets = inputs(11, 4, 65, device)
    targets.fill_(-1)
    for reduction, expected in (("mean", math.nan), ("sum", 0.0)):
        loss, dx, dweight = outcome(ops, x, weight, targets, reduction=reduction)
        torch.testing.assert_close(loss.item(), expected, equal_nan=True)
        assert not dx.any() and not dweight.any()


@pytest.mark.parametrize("ignore_index", [-100, 3, 1000])
def test_ignore_index(ops, device: str, small_chunks, ignore_index: int) -> None:
    """Any integer, even a class. Logits of an ignored row have no influence, however large."""
    x, weight, targets = inputs(12, 4, 65, device)
    targets[[1, 5, 10]] = ignore_index
    kept = (targets != ignore_index).nonzero()[:, 0]
    with torch.no_grad():
        x[5] = 1e30
    loss, dx, dweight = outcome(ops, x, weight, targets, ignore_index=ignore_index, z_loss=0.01)
    only = outcome(ops, x.detach()[kept].requires_grad_(), weight, targets[kept], z_loss=0.01)
    for value, expected in zip((loss, dx[kept], dweight), only, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    assert not dx[targets == ignore_index].any()


def test_int32_and_strided_targets(ops, device: str, small_chunks) -> None:
    x, weight, targets = inputs(12, 4, 65, device)
    expected = outcome(ops, x, weight, targets)
    both = torch.stack([targets, torch.zeros_like(targets)], dim=1)
    for same in (targets.int(), both[:, 0], both.int()[:, 0]):
        assert all(map(torch.equal, outcome(ops, x, weight, same), expected))


@pytest.mark.parametrize("target", [65, -2, 2**31 - 1, -(2**31), 2**40])
def test_target_that_is_no_class(ops, device: str, small_chunks, target: int) -> None:
    """Raises if that needs no synchronisation, else gives NaN; other rows are unaffected."""
    x, weight, targets = inputs(12, 4, 65, device)
    clean = outcome(ops, x, weight, targets)
    targets[9] = target
    if ops is torch_ops and device == "cpu":
        with pytest.raises(ValueError, match=rf"targets must lie in \[0, 65\).*got {target}$"):
            outcome(ops, x, weight, targets)
        return
    loss, dx, dweight = outcome(ops, x, weight, targets)
    assert loss.isnan() and dx[9].isnan().all() and dweight.isnan().all()
    others = torch.arange(12, device=device) != 9
    assert torch.equal(dx[others], clean[1][others])


def large_logits(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and targets for logits of +-1e4: rows with one, two or many winning classes."""
    logits = torch.randn(5, 300, device=device) * 3
    logits[0, 7], logits[1] = 1e4, logits[1] - 1e4
    logits[2], logits[2, 5:7] = -1e4, 1e4
    logits[3], logits[4] = logits[3] + 1e4, logits[4] * 3e3
    targets = logits.argmax(-1)
    targets[1], targets[3] = 11, 200
    # Each row of x selects one column of weight, so no product is rounded.
    return 128.0 * torch.eye(5, device=device), logits.t() / 128.0, targets


@pytest.mark.parametrize("z_loss", [0.0, 1e-8])
@pytest.mark.parametrize("dtype", parity.DTYPES, ids=str)
def test_large_logits(ops, device: str, dtype: torch.dtype, z_loss: float) -> None:
    x, weight, targets = large_logits(device)

    def whole(x: Tensor, weight: Tensor) -> Tensor:
        z = F.linear(x, weight).float()
        return (
            F.cross_entropy(z, targets, reduction="sum") + z_loss * z.logsumexp(-1).square().sum()
        )

    kernel, plain = (
        partial(module.linear_cross_entropy, targets=targets, z_loss=z_loss, reduction="sum")
        for module in (ops, reference)
    )
    tensors, grad = [x.to(dtype), weight.to(dtype)], torch.tensor(1.0, device=device)
    parity.assert_parity(kernel, whole, plain, tensors, grad, ["x", "weight"])


def test_large_logits_smoothed(ops, device: str) -> None:
    """The loss is in the hundreds, so it is compared with a relative tolerance."""
    x, weight, targets = large_logits(device)
    exact = [tensor.double().requires_grad_() for tensor in (x, weight)]
    results = outcome(
        ops, x.requires_grad_(), weight.requires_grad_(), targets, label_smoothing=0.1
    )
    expected = outcome(reference, exact[0], exact[1], targets, label_smoothing=0.1)
    for value, truth in zip(results, expected, strict=True):
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-4)


def test_a_wrong_target_costs_what_it_should(ops, device: str) -> None:
    """The winning logit is 2e4 above the target's: exp underflows, the loss does not."""
    weight = torch.tensor([[1e4], [-1e4], [0.0]], device=device, requires_grad=True)
    x = torch.ones(1, 1, device=device, requires_grad=True)
    loss, dx, dweight = outcome(ops, x, weight, torch.tensor([1], device=device))
    assert loss == 2e4 and dx.item() == 2e4
    assert dweight.flatten().tolist() == [1.0, -1.0, 0.0]


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, in the interpreter
def test_not_finite_logits_show(ops, device: str) -> None:
    for bad in (math.nan, math.inf):
        x, weight, targets = inputs(3, 4, 65, device)
        with torch.no_grad():
            x[1, 2] = bad
        loss, dx, _ = outcome(ops, x, weight, targets)
        assert loss.isnan() and dx[1].isnan().all() and dx[[0, 2]].isfinite().all()


def test_logits_are_never_whole(ops, device: str, small_chunks) -> None:
    """The largest allocation in forward and backward is one chunk of logits."""
    n_classes, width = 1000, 3
    x, weight, targets = inputs(3 * CHUNK, width, n_classes, device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    largest = {}
    for module in (ops, reference):
        with profile(activities=activities, profile_memory=True) as profiler:
            outcome(module, x, weight, targets)
        events = profiler.profiler.kineto_results.events()
        largest[module] = max(event.nbytes() for event in events if event.name() == "[memory]")
    assert largest[reference] >= 4 * 3 * CHUNK * n_classes  # full logits are visible
    assert largest[ops] <= 4 * CHUNK * 1024  # rows are padded to multiples of 64 elements


def test_what_lies_behind_a_row_is_a_number() -> None:
    """Padding of the buffer's rows must be finite: a CPU with AMX multiplies it by 0."""
    behind: list[Tensor] = []

    def rows(logits: Tensor, *_: Any) -> None:
        size, stride = logits.shape[0], logits.stride(0)
        behind.append(logits.as_strided((size, stride), (stride, 1)).clone())

    x, weight, targets = inputs(16, 32, 65, "cpu")
    x, weight = x.detach().bfloat16(), weight.detach().bfloat16()
    options = (torch.bfloat16, -1, True, 0.0, 0.0, True, True)
    *_, dx, dweight = partial(chunked_loss.forward, rows)(x, weight, targets, *options)
    assert behind[0].shape[1] > 65 and behind[0].isfinite().all()
    assert dx.isfinite().all() and dweight.isfinite().all()


def test_chunk_rows() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert chunked_loss.chunk_rows(50304, torch.bfloat16, cuda) == 4096
    assert chunked_loss.chunk_rows(50257, torch.float32, cuda) == 2048
    assert chunked_loss.chunk_rows(50304, torch.float32, cpu) == 512
    assert chunked_loss.chunk_rows(2**31, torch.float32, cpu) == 1
    for n_cols in (1, 65, 50257):
        rows = chunked_loss.chunk_rows(n_cols, torch.float32, cpu)
        assert rows * n_cols * 4 <= chunked_loss.CHUNK_BYTES["other"] < 2 * rows * n_cols * 4


class _LastProgram(Observer):
    def programs(self, tensors: list[Tensor], programs: list[Program]) -> list[Program]:
        return programs[-1:]


def test_addresses_past_2_to_31() -> None:
    """Just over 2^31 logits, in memory of which only the last row is touched."""
    n_cols, stride = 39999, 40000
    n_rows = 2**31 // stride + 2
    memory = mmap.mmap(-1, 2 * n_rows * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    logits = torch.frombuffer(memory, dtype=torch.float16).view(n_rows, stride)[:, :n_cols]
    last = torch.randn(n_cols).half()
    logits[-1] = last
    targets, losses = torch.full((n_rows,), 39998), torch.zeros(n_rows)
    # an int32 overflow raises before it becomes an address
    with exchanged(Builder, _LastProgram()):
        linear_cross_entropy._rows(logits, targets, losses, -1, 0.0, 0.0, True)
    z = last.float().requires_grad_()
    expected = F.cross_entropy(z, targets[-1])
    torch.testing.assert_close(losses[-1], expected.detach())
    (gradient,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(logits[-1].float(), gradient, atol=1e-7, rtol=1e-3)
