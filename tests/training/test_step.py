"""One update: results, skipping, CUDA graphs."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastgpt import GPT
from fastgpt.data.batches import Batch
from fastgpt.training.distributed import ALONE, World
from fastgpt.training.optimizer import MasterAdamW, flat_size
from fastgpt.training.step import Step
from tests.tools.small_models import small_model, tokens
from tests.tools.small_runs import assert_same

BETAS = (0.9, 0.95)
DTYPES = [torch.float32, torch.bfloat16]


class Twins(World):
    """Stands in for two processes with equal models and batches."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.mul_(2)

    def broadcast(self, x: Tensor) -> None:
        pass


def optimizer_of(model: GPT, dtype: torch.dtype, world: World = ALONE) -> torch.optim.Optimizer:
    if dtype == torch.float32:
        device_type = next(model.parameters()).device.type
        return model.configure_optimizers(0.1, 1e-2, BETAS, device_type)
    return MasterAdamW(model, dtype, 0.1, 1e-2, BETAS, world)


def step_of(model: GPT, dtype: torch.dtype, **options: Any) -> Step:
    device = next(model.parameters()).device
    optimizer = optimizer_of(model, dtype, options.get("world", ALONE))
    return Step(model, optimizer, device, **options)


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
    # a Python float on a CPU: rounded to float32, updates would differ from nanoGPT's
    assert [type(group["lr"]) for group in step._optimizer.param_groups] == [float, float]


def test_masters_keep_what_bfloat16_weights_would_lose() -> None:
    """Updates of 1e-4 are half the spacing of bfloat16 near 0.04. With float32 masters the losses
    follow float32's, as under autocast; bfloat16 weights lose or double the updates."""

    def losses(dtype: torch.dtype, rounded: bool, under_autocast: bool) -> Tensor:
        model = small_model()
        if rounded:
            for p in model.low_precision_parameters():
                p.data = p.data.bfloat16()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=under_autocast)
        step = step_of(model, dtype, grad_clip=1.0, autocast=autocast)
        return torch.stack([step([batch(i % 5)], 1e-4).float() for i in range(60)])

    exact = losses(torch.float32, rounded=False, under_autocast=False)
    assert exact[-1] < exact[0] - 0.08
    for dtype, rounded, off in (
        (torch.float32, False, False),
        (torch.bfloat16, False, False),
        (torch.float32, True, True),
    ):
        found = losses(dtype, rounded, under_autocast=True)
        assert ((found - exact).abs().max() > 2e-3) == off, (dtype, rounded)


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
    assert step([batch(2)], 1e-2).isfinite()  # skipped until the host checks
    assert_same(weights(model), before)


def test_a_gradient_that_is_not_finite_is_noticed_by_its_norm() -> None:
    model = small_model()
    step = step_of(model, torch.bfloat16, grad_clip=1.0)
    model.get_parameter("transformer.ln_f.weight").register_hook(lambda g: g * math.inf)
    before = weights(model)
    assert step([batch(0)], 1e-2).isfinite()
    assert step.not_finite.item() == 1.0
    assert_same(weights(model), before)


def test_errors() -> None:
    model = small_model()
    step = step_of(model, torch.float32, micro_batches=2)
    with pytest.raises(ValueError, match="batches must hold 2 pairs, got 1"):
        step([batch(0)], 1e-3)
    with pytest.raises(ValueError, match="cuda_graph must be False on cpu, got True"):
        step_of(model, torch.float32, cuda_graph=True)
    optimizer, wrapped = optimizer_of(model, torch.float32), torch.compile(model, backend="eager")
    model.compile(backend="eager")
    for compiled in (wrapped, model):
        with pytest.raises(ValueError, match="cuda_graph must be False with a compiled model, "):
            Step(compiled, optimizer, torch.device("cpu"), cuda_graph=True)  # type: ignore[arg-type]


def test_all_processes_begin_with_the_weights_of_rank_0() -> None:
    class Second(World):
        def broadcast(self, x: Tensor) -> None:
            x.fill_(0.25)  # rank 0's values

    model = small_model()
    MasterAdamW(model, torch.bfloat16, 0.1, 1e-2, BETAS, Second(rank=1, size=2))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert all((p == 0.25).all() for p in model.parameters())


def test_gradients_are_summed_once_an_update() -> None:
    """All-reduce once per update: two flat buffers, then the number of targets and the loss."""
    sizes: list[int] = []

    class Counting(Twins):
        def all_reduce(self, x: Tensor) -> Tensor:
            sizes.append(x.numel())
            return super().all_reduce(x)

    model = small_model()
    step = step_of(model, torch.bfloat16, micro_batches=2, world=Counting(size=2))
    step([batch(0), batch(1)], 1e-3)
    params = list(model.parameters())
    flat = [flat_size(p for p in params if (p.dim() >= 2) is decayed) for decayed in (True, False)]
    assert sorted(sizes) == sorted([1, 1, *flat])


def test_nothing_may_come_behind_the_sum_over_processes() -> None:
    model = small_model()
    optimizer = MasterAdamW(model, torch.bfloat16, 0.1, 1e-2, BETAS, Twins(size=2))
    x, y = batch(0)
    model(x, y)[1].backward()
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="backward must not be called between"):
        model(x, y)[1].backward()
    optimizer.zero_grad()
    model(x, y)[1].backward()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


def trained(dtype: torch.dtype, updates: int, **options: Any) -> tuple[Tensor, GPT]:
    model = small_model(dropout=0.1).cuda()
    step = step_of(model, dtype, micro_batches=2, grad_clip=1.0, **options)
    torch.manual_seed(3)
    losses = [
        step([batch(2 * i, "cuda"), batch(2 * i + 1, "cuda")], 1e-3 * (1 + i % 3))
        for i in range(updates)
    ]
    return torch.stack(losses), model


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("dtype", "world"),
    [(torch.float32, ALONE), (torch.bfloat16, ALONE), (torch.bfloat16, Twins(size=2))],
    ids=["float32", "bfloat16", "two processes"],
)
def test_a_graph_makes_the_same_updates(dtype: torch.dtype, world: World) -> None:
    """Equal losses and weights; dropout, learning rate and batches change with every update."""
    plain, model = trained(dtype, 12, world=world)
    graphed, same = trained(dtype, 12, world=world, cuda_graph=True)
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
