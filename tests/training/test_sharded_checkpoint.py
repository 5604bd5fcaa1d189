"""Sharded checkpoint folders: contents, detection of damage, no execution of code in them."""

import io
import os
import pickle
from dataclasses import asdict
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch

from fastgpt import GPT, GPTConfig
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import sharded_checkpoint
from fastgpt.training.distributed import ALONE
from tests.tools.small_runs import assert_same


@pytest.fixture
def state() -> dict[str, Any]:
    """A checkpoint after an update; plain tensors are saved like sharded ones."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(8, 32, 1, 2, 8, bias=True))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    x = torch.randint(32, (2, 8))
    model(x, x)[1].backward()
    optimizer.step()
    return {
        "model": model.state_dict(keep_vars=True),
        "optimizer": optimizer.state_dict(),
        "model_args": asdict(model.config),
        "iter_num": 4,
        "best_val_loss": torch.tensor(2.5),
        "config": {"n_layer": 1},
        "fastgpt": {"generators": [{"cpu": torch.get_rng_state()}]},
    }


def plain(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "model": {name: value.detach() for name, value in state["model"].items()}}


def test_a_folder_is_read_as_the_file_would_be(tmp_path: Path, state: dict[str, Any]) -> None:
    folder, file = tmp_path / "iter-0000004", tmp_path / "iter-0000004.pt"
    sharded_checkpoint.save(state, folder, ALONE)
    ckpt.save(plain(state), file)
    expected = ckpt.load(file)
    loaded = ckpt.load(folder)
    assert list(loaded) == list(expected)
    expected["model"] = dict(expected["model"])
    assert_same(loaded, expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name, file.name]
    header = ckpt.header(folder)
    assert header["iter_num"] == 4 and "state" not in header["optimizer"]
    # merged into one file for nanoGPT; the tied weight is stored once
    ckpt.publish(folder, tmp_path / "ckpt.pt")
    assert_same(dict(ckpt.load(tmp_path / "ckpt.pt")["model"]), dict(expected["model"]))
    assert (tmp_path / "ckpt.pt").stat().st_size < 1.05 * file.stat().st_size
    assert loaded["model"]["lm_head.weight"] is loaded["model"]["transformer.wte.weight"]


def test_a_crash_while_saving_leaves_the_old_folder(
    tmp_path: Path, state: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "iter-0000004"
    sharded_checkpoint.save(state, folder, ALONE)

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    for module, name in ((torch, "save"), (sharded_checkpoint, "write_json"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="No space left|could not write"):
                sharded_checkpoint.save({**state, "iter_num": 5}, folder, ALONE)
        assert ckpt.load(folder)["iter_num"] == 4
    sharded_checkpoint.save({**state, "iter_num": 5}, folder, ALONE)
    assert [p.name for p in tmp_path.iterdir()] == [folder.name]
    assert ckpt.load(folder)["iter_num"] == 5


def test_damage_is_found(tmp_path: Path, state: dict[str, Any]) -> None:
    folder = tmp_path / "iter-0000004"
    sharded_checkpoint.save(state, folder, ALONE)
    assert {"complete.json", "run.pt", ".metadata"} < {path.name for path in folder.iterdir()}
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        middle = len(whole) // 2
        changed = whole[:middle] + b"\x00\xff" + whole[middle + 2 :]
        for damaged in (b"", b"{}", whole[:middle], changed):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"iter-0000004 is not a complete .*{path.name}"):
                ckpt.load(folder)
        path.unlink()
        with pytest.raises(ValueError, match=f"iter-0000004 is not a complete .*{path.name}"):
            ckpt.load(folder)
        path.mkdir()
        with pytest.raises(ValueError, match=f"iter-0000004 is not a complete .*{path.name}"):
            ckpt.load(folder)
        path.rmdir()
        path.write_bytes(whole)
    assert ckpt.load(folder)["iter_num"] == 4


def test_another_models_shards_are_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    folder = tmp_path / "iter-0000004"
    sharded_checkpoint.save(state, folder, ALONE)
    for other in (GPTConfig(8, 32, 2, 2, 8), GPTConfig(8, 32, 1, 2, 16)):
        with pytest.raises(ValueError, match="iter-0000004 has no state to resume from: .*"):
            sharded_checkpoint.load_into(GPT(other), {}, folder)


class _Attack:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_every_python(module: str) -> None:
    """Python 3.13 pickles a path as ``pathlib._local``'s, whichever Python loads it."""
    pickled = io.BytesIO(f"c{module}\nPosixPath\n.".encode())
    assert sharded_checkpoint._Unpickler(pickled).load() is PosixPath


@pytest.mark.parametrize("function", [os.mkdir, eval, torch.load, pickle.loads])
def test_nothing_is_executed(tmp_path: Path, state: dict[str, Any], function: Any) -> None:
    """Even with valid checksums, which an attacker can write, too."""
    folder, trace = tmp_path / "iter-0000004", tmp_path / "executed"
    sharded_checkpoint.save(state, folder, ALONE)
    argument = str(trace) if function is os.mkdir else f"__import__('os').mkdir({str(trace)!r})"
    (folder / ".metadata").write_bytes(pickle.dumps(_Attack(function, argument)))
    sharded_checkpoint.write_json(
        {
            p.name: sharded_checkpoint._measured(p)
            for p in folder.iterdir()
            if p.name != "complete.json"
        },
        folder / "complete.json",
    )
    sharded_checkpoint.check(folder)
    with pytest.raises(ValueError, match=".metadata .* does not belong into"):
        ckpt.load(folder)
    assert not trace.exists()
