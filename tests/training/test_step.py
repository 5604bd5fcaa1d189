"""One update: what it makes of its batches, when it is not made, and as a CUDA graph."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgpt import GPT
from fastgpt.data.batches import Batch
from fastgpt.training.optimizer import MasterAdamW
from fastgpt.training.step import Step
from tests.tools.small_models import small_model, tokens
from tests.tools.small_runs import assert_same

BETAS = (0.9, 0.95)
DTYPES = [torch.float32, torch.bfloat16]


def optimizer_of(model: GPT, dtype: torch.dtype) -> torch.optim.Optimizer:
    if dtype == torch.float32:
        device_type = next(model.parameters()).device.type
        return model.configure_optimizers(0.1, 1e-2, BETAS, device_type)
    return MasterAdamW(model, dtype, 0.1, 1e-2, BETAS)


def step_of(model: GPT, dtype: torch.dtype, **options: Any) -> Step:
    device = next(model.parameters()).device
    return Step(model, optimizer_of(model, dtype), device, **options)


def batch(seed: int, device: str = "cpu") -> Batch:
    idx = tokens(seed=seed).to(device)
    return idx, idx.roll(-1, 1)


def weights(model: GPT) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_an_update_is_the_one_written_out() -> None:
    model, twin = small_model(), small_model()
    step = step_of(model, torch.float32, micro_batches=3, grad_clip=0.5)
    optimizer = optimizer_of(twin, torch.float32)
    for number in range(3):
        batches = [batch(3 * number + i) for i in range(3)]
        loss = step(iter(batches), learning_rate=1e-3 * (number + 1))
        expected = torch.zeros(())
        for x, y in batches:
            (part := twin(x, y)[1] / 3).backward()
            expected += part.detach()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (number + 1)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(loss, expected)
    assert_same(weights(model), weights(twin))


def test_master_weights_train_as_autocast_does() -> None:
    """In bfloat16 with rounded weights and float32 masters, or under autocast with float32 weights:
    the losses stay as near to float32's."""

    def losses(dtype: torch.dtype, autocast: AbstractContextManager[object] | None) -> Tensor:
        step = step_of(small_model(), dtype, grad_clip=1.0, autocast=autocast)
        return torch.stack([step([batch(i % 5)], 3e-3) for i in range(60)])

    exact = losses(torch.float32, None)
    under_autocast = losses(torch.float32, torch.autocast("cpu", torch.bfloat16))
    master = losses(torch.bfloat16, torch.autocast("cpu", torch.bfloat16))
    assert exact[-1] < 0.7 * exact[0]
    allowed = 2 * (under_autocast - exact).abs().max() + 1e-2
    assert (master - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_an_update_that_is_not_finite_is_not_made(dtype: torch.dtype, grad_clip: float) -> None:
    model = small_model()
    step = step_of(model, dtype, grad_clip=grad_clip)
    step([batch(0)], 1e-2)
    before = weights(model)
    x, y = batch(1)
    assert step([(x, torch.full_like(y, -1))], 1e-2).isnan()  # every target is ignored
    assert step.not_finite.item() == 1.0
    assert step([batch(2)], 1e-2).isfinite()  # nor any later one, until someone looked
    assert_same(weights(model), before)


def test_a_gradient_that_is_not_finite_is_noticed_by_its_norm() -> None:
    model = small_model()
    step = step_of(model, torch.bfloat16, grad_clip=1.0)
    model.get_parameter("transformer.ln_f.weight").register_hook(lambda g: g * math.inf)
    before = weights(model)
    assert step([batch(0)], 1e-2).isfinite()
    assert step.not_finite.item() == 1.0
    assert_same(weights(model), before)


class Replayed(TorchDispatchMode):
    """An update as a graph replays it, on the CPU: the operators of the first call, over and over,
    on the tensors and with the Python numbers that they had there."""

    def __init__(self, update: Callable[[list[Batch]], Tensor]) -> None:
        super().__init__()
        self._update = update
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._batches: list[Batch] = []
        self._loss = torch.zeros(())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def __call__(self, batches: Iterable[Batch]) -> Tensor:
        batches = [(x.clone(), y.clone()) for x, y in batches]
        if not self._batches:
            self._batches = batches
            with self:
                self._loss = self._update(batches)
            return self._loss.clone()
        for mine, given in zip(self._batches, batches, strict=True):
            torch._foreach_copy_(list(mine), list(given))
        with torch.no_grad():
            for func, args, kwargs, out in self._calls:
                new = func(*args, **kwargs)
                if not any(result.alias_info for result in func._schema.returns):  # a new tensor
                    for old, value in zip(tree_leaves(out), tree_leaves(new), strict=True):
                        if isinstance(old, Tensor):
                            old.copy_(value)
        return self._loss.clone()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_replay_makes_the_same_updates(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the learning rate as it is on CUDA. What changes from update to update lies in tensors,
    and both ways compute with the same numbers, to the bit."""
    monkeypatch.setattr("fastgpt.training.step._LEARNING_RATE_ON_DEVICE", ("cpu",))

    def run(replayed: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = small_model(dropout=0.1)
        step = step_of(model, dtype, micro_batches=2, grad_clip=1.0)
        update = Replayed(step._update)
        torch.manual_seed(3)
        losses = []
        for i in range(6):
            if i == 3 and replayed:  # as late as a graph is captured
                step._update = update  # type: ignore[method-assign]
            losses.append(step([batch(2 * i), batch(2 * i + 1)], 1e-3 * (1 + i % 3)))
        for group in step._optimizer.param_groups:
            assert group["lr"].dtype == torch.float32
        return torch.stack(losses), weights(model)

    losses, expected = run(False)
    replayed, found = run(True)
    assert torch.equal(replayed, losses)
    assert_same(found, expected)


def test_the_learning_rate_is_a_number_on_a_cpu() -> None:
    """nanoGPT's update to the bit: rounded to float32 it would be another."""
    step = step_of(small_model(), torch.float32)
    step([batch(0)], 0.1)
    assert [group["lr"] for group in step._optimizer.param_groups] == [0.1, 0.1]


def test_errors() -> None:
    model = small_model()
    step = step_of(model, torch.float32, micro_batches=2)
    with pytest.raises(ValueError, match="batches must hold 2 pairs, got 1"):
        step([batch(0)], 1e-3)
    with pytest.raises(ValueError, match="cuda_graph must be False on cpu, got True"):
        step_of(model, torch.float32, cuda_graph=True)
    wrapped = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="cuda_graph must be False with a compiled model, got T"):
        Step(wrapped, optimizer_of(model, torch.float32), torch.device("cpu"), cuda_graph=True)  # type: ignore[arg-type]
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="cuda_graph must be False with a compiled model, got T"):
        step_of(model, torch.float32, cuda_graph=True)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def trained(dtype: torch.dtype, updates: int, **options: Any) -> tuple[Tensor, GPT]:
    model = small_model(dropout=0.1).cuda()
    step = step_of(model, dtype, micro_batches=2, grad_clip=1.0, **options)
    torch.manual_seed(3)

    def batches(number: int) -> Iterable[Batch]:
        return [batch(2 * number + i, "cuda") for i in range(2)]

    losses = [step(batches(i), 1e-3 * (1 + i % 3)) for i in range(updates)]
    return torch.stack(losses), model


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_makes_the_same_updates(dtype: torch.dtype) -> None:
    """Loss for loss and weight for weight; dropout, learning rate and batches change each time."""
    plain, model = trained(dtype, 12)
    graphed, same = trained(dtype, 12, cuda_graph=True)
    torch.testing.assert_close(graphed, plain, rtol=0.0, atol=0.0)
    assert_same(weights(same), weights(model))


@pytest.mark.gpu
@needs_gpu
def test_dropout_changes_with_every_replay() -> None:
    model = small_model(dropout=0.5).cuda()
    step = step_of(model, torch.bfloat16, cuda_graph=True)
    same_batch = batch(0, "cuda")
    losses = torch.stack([step([same_batch], 0.0) for _ in range(12)])
    assert len(losses.tolist()) == len(set(losses.tolist()))


@pytest.mark.gpu
@needs_gpu
def test_a_graph_notices_what_is_not_finite() -> None:
    model = small_model().cuda()
    step = step_of(model, torch.bfloat16, cuda_graph=True, grad_clip=1.0)
    x, y = batch(0, "cuda")
    for _ in range(6):
        step([(x, y)], 1e-3)
    before = weights(model)
    step([(x, torch.full_like(y, -1))], 1e-3)
    step([(x, y)], 1e-3)
    assert step.not_finite.item() == 1.0
    assert_same(weights(model), before)
    with pytest.raises(ValueError, match="must have the shape"):
        step([(x[:1], y[:1])], 1e-3)
    with pytest.raises(ValueError, match="batches must hold 1 pairs, got 2"):
        step([(x, y), (x, y)], 1e-3)
