"""nanoGPT's checkpoint format, read and written; atomic saving."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.sampler import Sampler
from fastgpt.training import checkpoint as ckpt
from fastgpt.training.config import SampleConfig, TrainConfig
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import data_set, small_config

MODEL_ARGS = ["n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"]


@pytest.fixture
def run(tmp_path: Path) -> Trainer:
    data_set(tmp_path)
    trainer = Trainer(small_config(tmp_path))
    trainer.run()
    return trainer


def nanogpt_checkpoint(path: Path, config: TrainConfig, vocab_size: int) -> dict[str, Any]:
    """Write a checkpoint like nanoGPT's: of a compiled model, with only its keys."""
    torch.manual_seed(3)
    args = {key: getattr(config, key) for key in MODEL_ARGS if key != "vocab_size"}
    args["vocab_size"] = vocab_size
    model = GPT(GPTConfig(**args))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    x = torch.randint(vocab_size, (2, 8))
    model(x, x)[1].backward()
    optimizer.step()
    state = {
        "model": {f"_orig_mod.{name}": value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 7,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "small", "out_dir": str(path.parent), "dtype": "bfloat16"},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return state


def test_ours_has_what_nanogpt_reads(run: Trainer) -> None:
    for name in ("ckpt.pt", "iter-0000021.pt"):
        saved = torch.load(run.out_dir / name, weights_only=True)
        theirs = "model optimizer model_args iter_num best_val_loss config"
        assert list(saved)[:6] == theirs.split()
        assert sorted(saved["model_args"]) == sorted(MODEL_ARGS)
        assert saved["best_val_loss"].dim() == 0
        assert saved["best_val_loss"].item() == run.best_val_loss
        assert saved["config"] == vars(run.config)
        model = GPT(GPTConfig(**saved["model_args"]))
        torch.nn.Module.load_state_dict(model, saved["model"], strict=True)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        optimizer.load_state_dict(saved["optimizer"])
    assert saved["iter_num"] == 21
    for name, value in run.model.state_dict().items():
        assert torch.equal(saved["model"][name], value)


def test_nanogpts_is_resumed_and_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer comes from the data set."""
    monkeypatch.chdir(tmp_path)
    data_dir = data_set(tmp_path / "data")
    changes: dict[str, Any] = dict(data_root="data", out_dir="out")
    vocab_size = Trainer(small_config(tmp_path, **changes)).model.config.vocab_size
    config = small_config(tmp_path, **changes, init_from="resume", max_iters=12, weight_decay=0.3)
    theirs = nanogpt_checkpoint(tmp_path / "out" / "ckpt.pt", config, vocab_size)
    sampling = SampleConfig(num_samples=2, max_new_tokens=9, device="cpu")
    assert [len(text) for text in Sampler(sampling)] == [10, 10]
    trainer = Trainer(config)
    assert trainer.iter_num == 7 and trainer.best_val_loss == 2.5
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3, 0.0]
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, theirs["model"][f"_orig_mod.{name}"])
    first = next(iter(trainer.optimizer.state.values()))
    assert torch.equal(first["exp_avg"], theirs["optimizer"]["state"][0]["exp_avg"])
    trainer.run()
    assert trainer.iter_num == 13
    nanogpt_checkpoint(tmp_path / "out" / "ckpt.pt", config, vocab_size)
    (data_dir / "meta.pkl").unlink()
    with pytest.raises(ValueError, match=f"vocabulary of {vocab_size} tokens, but its data set's"):
        Sampler(sampling)


def test_a_crash_while_saving_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.pt"
    ckpt.save({"iter_num": 1}, path)

    def half(state: object, file: Any) -> None:
        file.write(b"PK half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        ckpt.save({"iter_num": 2}, path)
    assert torch.load(path)["iter_num"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["some.pt"]


@pytest.mark.parametrize("name", ["folder", "absent/ckpt.pt", "file/ckpt.pt"])
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, name: str) -> None:
    """And not the temporary file beside it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as failed:
        ckpt.save({}, tmp_path / name)
    assert failed.value.filename == str(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_damaged_and_foreign_files_are_named(run: Trainer) -> None:
    path = run.out_dir / "ckpt.pt"
    whole = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no checkpoint .*absent.pt"):
        ckpt.load(run.out_dir / "absent.pt")
    for damage in (b"", b"hello", whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="ckpt.pt is not a checkpoint .* damaged"):
            ckpt.load(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match="ckpt.pt is not a checkpoint .* wrong checksum"):
        ckpt.load(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="ckpt.pt must hold a dict with the keys .* got list"):
        ckpt.load(path)
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="ckpt.pt lacks the checkpoint key model_args"):
        ckpt.load(path)
    for key in ("model_args", "config", "fastgpt"):
        torch.save({"model": {}, "model_args": {}, key: None}, path)
        with pytest.raises(ValueError, match=f"ckpt.pt must hold a dict under the key {key}, got"):
            ckpt.load(path)
    torch.save({"model": TrainConfig}, path)
    for read in (ckpt.load, ckpt.header):
        with pytest.raises(ValueError, match="ckpt.pt holds objects of .*TrainConfig, ") as raised:
            read(path)
        assert "\n" not in str(raised.value) and "weights_only=False" in str(raised.value)


def test_a_checkpoint_with_wrong_contents_is_named(run: Trainer, tmp_path: Path) -> None:
    path = run.out_dir / "iter-0000021.pt"
    whole = torch.load(path)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"model_args": {"n_layer": 2, "colour": 1}}, "holds no model .*colour"),
        ({"model_args": None}, "must hold a dict under the key model_args, got NoneType"),
        ({"config": None}, "must hold a dict under the key config, got NoneType"),
        ({"model": {}}, "holds no model .*Missing key"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "has no state to resume from"),
        ({"fastgpt": {"data": {}}}, "has no state to resume from"),
    ]
    for change, message in changes:
        torch.save({**whole, **change}, path)
        with pytest.raises(ValueError, match=f"iter-0000021.pt {message}"):
            Trainer(small_config(tmp_path, init_from="resume"))
