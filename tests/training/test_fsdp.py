"""A sharded model in two processes: its shards, its collectives, parity with one process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import GPT, GPTConfig
from fastgpt.bigram import Bigram
from fastgpt.devices import autocast
from fastgpt.kernels import _host, fused
from fastgpt.training import fsdp, step
from fastgpt.training.distributed import World
from fastgpt.training.trainer import Trainer
from tests.tools import interpreter
from tests.tools.forked import Forked
from tests.tools.small_runs import data_set, quiet, small_config

KEYS: dict[str, Any] = {"dropout": 0.0, "parallel": "fsdp", "gradient_accumulation_steps": 2}


def _built(root: Path, world: World, **changes: Any) -> Trainer:
    return Trainer(small_config(root, **{**KEYS, **changes}), quiet(), world)


def _updates(trainer: Trainer, count: int) -> list[float]:
    return [float(trainer._update(1e-2)[0]["loss"]) for _ in range(count)]


def _parts(root: Path, world: World) -> None:
    """Each rank holds half of each tensor, rounded up to whole rows, and the tied weight once."""
    trainer = _built(root, world)
    _updates(trainer, 1)
    names = dict(trainer.model.named_parameters())
    assert "lm_head.weight" not in names
    for p in names.values():
        assert isinstance(p, DTensor) and p.dtype == torch.float32
        assert p.to_local().shape[0] <= -(-p.shape[0] // 2)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = trainer.optimizer.state[p][name]
            assert moment.to_local().shape == p.to_local().shape
    held = sum(p.to_local().numel() for p in names.values() if isinstance(p, DTensor))
    positions = trainer.config.block_size * trainer.config.n_embd
    expected = trainer.model.get_num_params() + positions  # which get_num_params() leaves out
    assert sum(world.all_gather_object(held)) == expected


class _Calls(TorchDispatchMode):
    """Records the names of all operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def _exchange(root: Path, world: World) -> None:
    """Gradients are reduced once per update, independent of the number of micro-batches."""
    for count in (2, 4):
        trainer = _built(root, world, gradient_accumulation_steps=count)
        _updates(trainer, 1)
        with _Calls() as calls:
            _updates(trainer, 1)
        scatters = [name for name in calls.names if "reduce_scatter" in name]
        assert len(scatters) == trainer.config.n_layer + 2  # blocks, LayerNorms, the rest


def _same_numbers(root: Path, world: World) -> None:
    """Compiled runs equal eager ones; bfloat16 is close. aot_eager traces like Inductor, whose code
    for the model is tested in ``test_model_parity``."""
    plain = _updates(_built(root, world, bias=True), 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        one = [_updates(_built(root, world, n_layer=1, compile=c), 3) for c in (False, True)]
    assert one[0] == pytest.approx(one[1], abs=1e-5)
    trainer = _built(root, world, bias=True, dtype="bfloat16")
    rounded = _updates(trainer, 4)
    assert plain != rounded and plain == pytest.approx(rounded, abs=2e-2)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    alone = trainer.full_model()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(alone.state_dict()[name], value.full_tensor())
    bigram = _built(root, world, model="bigram")
    _updates(bigram, 1)
    assert isinstance(bigram.full_model(), Bigram)


def _after_evaluation(root: Path, world: World) -> None:
    """A forward without backward, which does not call the LayerNorms, changes no update."""
    plain = _updates(_built(root, world), 2)
    trainer = _built(root, world)
    losses = []
    for _ in range(2):
        trainer.evaluate()
        losses += _updates(trainer, 1)
    assert losses == plain


def _learning_rate(root: Path, world: World) -> None:
    """As on CUDA, where the learning rate is an unsharded tensor among sharded ones."""
    plain = _updates(_built(root, world, n_layer=1), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "_LEARNING_RATE_ON_DEVICE", ("cpu",))
        trainer = _built(root, world, n_layer=1)
        assert _updates(trainer, 3) == pytest.approx(plain, rel=1e-5)
    assert all(type(group["lr"]) is torch.Tensor for group in trainer.optimizer.param_groups)


def _kernels(world: World) -> None:
    """Parameters are resharded between the kernels' forward and backward."""
    interpreter.install()
    _host.INTERPRETED = True
    config = GPTConfig(8, 64, 2, 2, 32, dropout=0.0, bias=True)
    idx = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(world.rank))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        torch.manual_seed(0)
        plain, model = GPT(config), GPT(config, ops=fused, recompute=True)
        model.load_state_dict(plain.state_dict())
        fsdp.shard(model, torch.device("cpu"), world, dtype)
        with autocast(torch.device("cpu"), dtype):
            model(idx[:, :-1], idx[:, 1:])[1].backward()
        plain(idx[:, :-1], idx[:, 1:])[1].backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            expected = world.all_reduce(p.grad) / world.size
            error = (fsdp.full_tensor(q.grad) - expected).norm() / (expected.norm() + 1e-3)
            assert error < tolerance, tuple(p.shape)


def _checks(root: Path) -> None:
    torch.set_num_threads(1)
    world = World.from_environment()
    with world.connected(torch.device("cpu"), "gloo"):
        for check in (_parts, _exchange, _same_numbers, _after_evaluation, _learning_rate):
            check(root, world)
        _kernels(world)  # last: it installs the interpreter


def test_in_two_processes(tmp_path: Path) -> None:
    data_set(tmp_path)
    Forked(_checks, tmp_path, processes=2).finished()


def test_half_precision_that_overflows_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastgpt.training.run.resolve_dtype", lambda dtype, device: torch.float16)
    config = small_config(tmp_path, parallel="fsdp", dtype="float16")
    with pytest.raises(ValueError, match="dtype must be .* with parallel='fsdp', got float16"):
        Trainer(config, quiet(), World(size=2))
