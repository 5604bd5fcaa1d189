"""The training loop against a plain one, and the ways in which a run stops."""

import functools
import io
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastgpt import GPT, GPTConfig
from fastgpt.data.batches import Batch, Batches
from fastgpt.tokenizer import CharTokenizer
from fastgpt.training import checkpoint as ckpt
from fastgpt.training.distributed import World
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import assert_same, data_set, quiet, small_config, state_of, trained

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


@pytest.fixture(autouse=True)
def small_data(tmp_path: Path) -> Path:
    return data_set(tmp_path)


def test_learning_rate_schedule(tmp_path: Path) -> None:
    trainer = Trainer(
        small_config(tmp_path, learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=110)
    )
    found = [trainer.learning_rate(i) for i in (0, 9, 10, 35, 60, 110, 10**6)]
    decayed = [1e-4 + 0.5 * (1 + math.sqrt(0.5)) * 9e-4, (1e-3 + 1e-4) / 2, 1e-4, 1e-4]
    assert found == pytest.approx([1e-3 * 1 / 11, 1e-3 * 10 / 11, 1e-3, *decayed], rel=1e-12)
    # a warm-up as long as the decay leaves no cosine in between
    trainer.config = small_config(tmp_path, warmup_iters=20, lr_decay_iters=20)
    assert trainer.learning_rate(20) == trainer.config.min_lr
    trainer.config = small_config(tmp_path, decay_lr=False, learning_rate=0.5)
    assert trainer.learning_rate(0) == trainer.learning_rate(10**6) == 0.5


def test_the_loop_is_the_one_written_out_by_hand(tmp_path: Path) -> None:
    config = small_config(tmp_path, max_iters=11, gradient_accumulation_steps=3, grad_clip=0.5)
    trainer = Trainer(config, quiet())
    torch.manual_seed(config.seed)
    assert trainer.tokenizer is not None
    model = GPT(
        GPTConfig(16, trainer.tokenizer.vocab_size, 2, 2, 16, dropout=0.1, bias=False)
    ).train()
    state = torch.get_rng_state()
    trainer.run()

    torch.set_rng_state(state)
    batches = Batches(config.data_dir, 4, 16, "cpu", config.seed)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    for iteration in range(12):  # 0 .. max_iters inclusive
        for group in optimizer.param_groups:
            group["lr"] = trainer.learning_rate(iteration)
        for _ in range(3):
            x, y = batches.next("train")
            (model(x, y)[1] / 3).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(dict(trainer.model.state_dict()), dict(model.state_dict()))
    assert trainer.iter_num == 12


def test_training_learns_and_reports(tmp_path: Path) -> None:
    out = io.StringIO()
    trainer = Trainer(small_config(tmp_path, max_iters=60, lr_decay_iters=60), Console(file=out))
    before = trainer.evaluate()
    assert before == trainer.evaluate()  # same batches, no dropout, no state changed
    trainer.run()
    assert trainer.best_val_loss < before["val"] - 0.5
    text = out.getvalue()
    assert f"step 0: train loss {before['train']:.4f}, val loss {before['val']:.4f}" in text
    assert "iter 5: loss" in text and "tokens/s" in text and "iter 4:" not in text
    assert "mfu" not in text  # defined only for GPUs


def test_recompute_trains_to_the_same_weights_and_losses(tmp_path: Path) -> None:
    kept, again = (trained(tmp_path, recompute=recompute) for recompute in (False, True))
    assert kept.val_loss == again.val_loss
    assert_same(dict(kept.model.state_dict()), dict(again.model.state_dict()))
    resumed = Trainer(small_config(tmp_path, recompute=True, init_from="resume"), quiet())
    for trainer, expected in ((kept, False), (again, True), (resumed, True)):
        assert isinstance(trainer.model, GPT) and trainer.model.recompute is expected


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, highlight=False)
    Trainer(small_config(tmp_path), console).run()
    text = out.getvalue()
    assert "21/21" in text and "tokens/s" in text
    assert "step 10: train loss" in text and "iter 5:" not in text
    # a terminal without cursor control gets lines
    console = Console(file=(out := io.StringIO()), force_terminal=True, _environ={"TERM": "dumb"})
    Trainer(small_config(tmp_path), console).run()
    assert "iter 5: loss" in out.getvalue()


def test_when_checkpoints_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 2.0, 2.5, 1.0, 2.2])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"train": 0.0, "val": next(losses)})
    written: list[str] = []
    save, publish = ckpt.save, ckpt.publish

    def noted(state: ckpt.Checkpoint, path: Path) -> None:
        written.append(path.name)
        assert path.name == f"iter-{state['iter_num']:07d}.pt"
        save(state, path)

    def published(source: Path, path: Path) -> None:
        written.append(path.name)
        publish(source, path)
        assert path.read_bytes() == source.read_bytes()

    monkeypatch.setattr(ckpt, "save", noted)
    monkeypatch.setattr(ckpt, "publish", published)
    trained(tmp_path, max_iters=32, always_save_checkpoint=False)
    assert written == [
        "iter-0000010.pt",  # iteration 0 is never written
        "ckpt.pt",
        "iter-0000020.pt",
        "iter-0000030.pt",
        "ckpt.pt",
        "iter-0000033.pt",
    ]
    assert state_of(tmp_path)["best_val_loss"].item() == 1.0
    left = sorted(path.name for path in (tmp_path / "out").glob("iter-*"))
    assert left == ["iter-0000030.pt", "iter-0000033.pt"]  # keep_last; 30 is also the best
    losses = iter([3.0, 2.0, 2.5])
    written.clear()
    trained(tmp_path, max_iters=12, always_save_checkpoint=True, keep_last=1)
    assert written == ["iter-0000010.pt", "ckpt.pt", "iter-0000013.pt", "ckpt.pt"]
    left = sorted(path.name for path in (tmp_path / "out").glob("iter-*"))
    assert left == ["iter-0000010.pt", "iter-0000013.pt"]  # 10 is the best


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems")
def test_two_runs_do_not_write_into_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, second = (Trainer(small_config(tmp_path), quiet()) for _ in range(2))
    evaluate = Trainer.evaluate

    def meanwhile(self: Trainer) -> dict[str, float]:
        if self is trainer:
            with pytest.raises(ValueError, match="another process is writing to .*out"):
                second.run()
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", meanwhile)
    trainer.run()
    assert state_of(tmp_path)["iter_num"] == 21
    assert not (tmp_path / "out" / "previous-1").exists()
    second.run()
    assert (tmp_path / "out" / "previous-1").exists()


def test_eval_only_changes_nothing(tmp_path: Path) -> None:
    trainer = trained(tmp_path, eval_only=True)
    assert trainer.iter_num == 0 and math.isfinite(trainer.val_loss)
    assert not (tmp_path / "out").exists()
    # a run also works outside the main thread, which cannot receive signals
    thread = threading.Thread(target=trained, args=(tmp_path,))
    thread.start()
    thread.join()
    assert state_of(tmp_path)["iter_num"] == 21


def test_divergence_stops_before_the_step(tmp_path: Path) -> None:
    trained(tmp_path, max_iters=10)
    keys: dict[str, Any] = dict(learning_rate=1e30, decay_lr=False, grad_clip=0.0)
    config = small_config(tmp_path, max_iters=100, init_from="resume", **keys)
    trainer = Trainer(config, quiet())
    last = tmp_path / "out" / "iter-0000011.pt"
    before = last.read_bytes()
    with pytest.raises(FloatingPointError, match=f"not finite at iteration .*1e.30.*{last.name}"):
        trainer.run()
    assert last.read_bytes() == before


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", "float32"),
        *(
            pytest.param("cuda", dtype, marks=[pytest.mark.gpu, needs_gpu])
            for dtype in ("float32", "bfloat16", "float16")
        ),
    ],
)
def test_ignored_targets_change_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, dtype: str
) -> None:
    """On a GPU the host notices only later, so the optimizer itself must skip the update."""
    few = dict(n_layer=1, gradient_accumulation_steps=1, batch_size=2, log_interval=3)
    config = small_config(tmp_path, device=device, dtype=dtype, **few)
    trainer = Trainer(config, quiet())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    following = Batches.next

    def ignored(self: Batches, *args: Any) -> Batch:
        x, y = following(self, *args)
        return x, torch.full_like(y, -1)

    monkeypatch.setattr(Batches, "next", ignored)
    trainer.iter_num = 1  # the next look at the loss is at iteration 3
    with pytest.raises(FloatingPointError, match="all targets of a batch are ignored.*none yet"):
        trainer.run()
    assert_same(dict(trainer.model.state_dict()), before)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_a_validation_loss_that_is_not_finite_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, math.nan])
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {"train": 0.0, "val": next(losses)})
    with pytest.raises(FloatingPointError, match="at iteration 10"):
        trained(tmp_path)
    assert not list((tmp_path / "out").glob("*.pt"))


def test_bfloat16_on_the_cpu(tmp_path: Path) -> None:
    """The model's matrices are bfloat16; the checkpoint has the float32 master weights."""
    exact = trained(tmp_path)
    trainer = trained(tmp_path, dtype="bfloat16")
    held = trainer.model.get_parameter("lm_head.weight")
    assert held.dtype == torch.bfloat16
    assert trainer.val_loss == pytest.approx(exact.val_loss, abs=0.03)
    saved = state_of(tmp_path)
    assert all(weight.dtype == torch.float32 for weight in saved["model"].values())
    weight = saved["model"]["lm_head.weight"]
    assert not torch.equal(weight, weight.bfloat16().float())
    assert torch.equal(held, weight.bfloat16())
    # nanoGPT and a float32 run can resume from it
    resumed = Trainer(small_config(tmp_path, init_from="resume"), quiet())
    assert_same(dict(resumed.model.state_dict()), dict(saved["model"]))
    assert saved["optimizer"]["param_groups"][0]["capturable"] is False


def test_compile_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    trained(tmp_path, compile=True, max_iters=2, dropout=0.0)
    assert graphs
    assert list(state_of(tmp_path)["model"])[0] == "transformer.wte.weight"  # no _orig_mod.


def test_when_updates_are_replayed_as_a_cuda_graph(tmp_path: Path) -> None:
    """Never with a compiled model, for which a notice is printed."""
    half, wide = torch.bfloat16, torch.float32
    for keys, dtype, processes, replayed, said in (
        ({}, half, 1, True, False),
        ({"cuda_graph": False}, half, 1, False, False),
        ({"compile": True}, half, 1, False, True),
        ({"compile": True, "cuda_graph": False}, wide, 1, False, False),
        ({"compile": True}, torch.float16, 1, False, False),
        ({}, half, 2, True, False),
        ({}, wide, 2, False, False),
    ):
        trainer = Trainer(small_config(tmp_path, **keys), console := quiet())
        assert not trainer._uses_cuda_graph()  # on a CPU
        trainer.device, trainer.dtype = torch.device("cuda"), dtype
        trainer.world = World(size=processes)
        assert trainer._uses_cuda_graph() is replayed
        assert isinstance(console.file, io.StringIO)
        note = "compile=True: updates are not replayed as a CUDA graph"
        assert (note in console.file.getvalue()) is said


def test_pretrained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pretrained(name: str, override_args: dict[str, float]) -> GPT:
        assert name in ("gpt2-medium", "openai-community/gpt2-medium")
        return GPT(GPTConfig(32, 300, 3, 2, 8, bias=True, **override_args), gelu="tanh")  # type: ignore[arg-type]

    monkeypatch.setattr(GPT, "from_pretrained", pretrained)
    for owner in ("", "openai-community/"):
        with pytest.raises(
            ValueError, match="needs a data set of GPT-2's tokens, but .*small has others"
        ):
            Trainer(small_config(tmp_path, init_from=f"{owner}gpt2-medium"))
    for name in ("manifest.json", "meta.pkl"):
        (tmp_path / "small" / name).unlink()
    assert Trainer(small_config(tmp_path)).model.config.vocab_size == 50304
    with pytest.raises(ValueError, match="block_size must be at most 32 .* got 33"):
        Trainer(small_config(tmp_path, init_from="gpt2-medium", block_size=33))
    trainer = trained(tmp_path, init_from="gpt2-medium", dropout=0.2, recompute=True)
    assert trainer.model.config.dropout == 0.2 and trainer.model.config.block_size == 16
    assert trainer.config.n_layer == 3 and trainer.config.bias
    assert isinstance(trainer.model, GPT) and trainer.model.recompute
    assert state_of(tmp_path)["fastgpt"]["gelu"] == "tanh"


def test_what_a_run_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT, "from_pretrained", lambda *args: pytest.fail("data come first"))
    with pytest.raises(FileNotFoundError, match="absent.*train.bin"):
        Trainer(small_config(tmp_path, dataset="absent", init_from="gpt2"))
    with pytest.raises(FileNotFoundError, match="no ckpt.pt or iter-.*.pt in .*out"):
        Trainer(small_config(tmp_path, init_from="resume"))
    tokenizer = tmp_path / "small" / "meta.pkl"
    tokenizer.write_bytes(CharTokenizer(dict(enumerate("ab"))).file_bytes)
    with pytest.raises(ValueError, match="meta.pkl must be the tokenizer .* is a different one"):
        Trainer(small_config(tmp_path))
    tokenizer.unlink()
    with pytest.raises(ValueError, match="meta.pkl must be the tokenizer .* but is missing"):
        Trainer(small_config(tmp_path))
    tokenizer.mkdir()
    with pytest.raises(IsADirectoryError, match="meta.pkl"):
        Trainer(small_config(tmp_path))
    data_set(tmp_path)
    with pytest.raises(ValueError, match="block_size=100000"):
        Trainer(small_config(tmp_path, block_size=100000))
    with pytest.raises(ValueError, match="device must be one that this machine has .* got 'cudo'"):
        Trainer(small_config(tmp_path, device="cudo"))
    keys = small_config(tmp_path, gradient_accumulation_steps=5)
    with pytest.raises(ValueError, match="must be a multiple of the 2 processes .* got 5"):
        Trainer(keys, world=World(size=2))
