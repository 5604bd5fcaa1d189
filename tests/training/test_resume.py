"""Killed and stopped runs resume bit for bit."""

import io
import math
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastgpt.training.trainer import Trainer
from tests.tools.forked import Forked
from tests.tools.small_runs import (
    TEXT,
    assert_same,
    data_set,
    interrupted,
    quiet,
    small_config,
    small_keys,
    state_of,
    trained,
)
from tests.training.processes import command, killed_once


@pytest.fixture(autouse=True)
def small_data(tmp_path: Path) -> Path:
    return data_set(tmp_path)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    keys: dict[str, Any] = dict(
        max_iters=50, lr_decay_iters=50, eval_interval=20, always_save_checkpoint=False
    )
    Forked(killed_once, command(small_keys(tmp_path, **keys))).finished(-signal.SIGKILL)
    assert state_of(tmp_path)["iter_num"] == 20
    trained(tmp_path, **keys, init_from="resume")
    resumed = state_of(tmp_path)

    trained(tmp_path, **keys)
    whole = state_of(tmp_path)
    assert whole["iter_num"] == 51
    for state in (resumed, whole):
        state["config"].pop("init_from")
    assert_same(resumed, whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stop_at_any_iteration_is_seamless(tmp_path: Path, dtype: str) -> None:
    whole = trained(tmp_path, max_iters=25, dtype=dtype)
    saved = state_of(tmp_path)
    with interrupted(Trainer, 13), pytest.raises(KeyboardInterrupt):
        trained(tmp_path, max_iters=25, dtype=dtype)
    assert state_of(tmp_path)["iter_num"] == 14  # the update in progress was finished
    resumed = trained(tmp_path, max_iters=25, dtype=dtype, init_from="resume")
    assert_same(dict(resumed.model.state_dict()), dict(whole.model.state_dict()))
    again = state_of(tmp_path)
    for key in ("model", "optimizer"):  # master weights and moments
        assert_same(dict(again[key]), dict(saved[key]))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_message_names_the_command_to_resume(tmp_path: Path) -> None:
    out, out_dir = io.StringIO(), str(tmp_path / "my run")
    console = Console(file=out, width=300)
    with interrupted(Trainer, 1), pytest.raises(KeyboardInterrupt):
        Trainer(small_config(tmp_path, out_dir=out_dir), console).run()
    words = shlex.split(out.getvalue())
    assert words[-4:] == ["fastgpt", "train", "--init_from=resume", f"--out_dir={out_dir}"]


def test_the_shape_comes_from_the_checkpoint(tmp_path: Path) -> None:
    trained(tmp_path)
    out = io.StringIO()
    config = small_config(tmp_path, init_from="resume", n_layer=5, block_size=8, dropout=0.3)
    trainer = Trainer(config, Console(file=out, width=200))
    assert (trainer.config.n_layer, trainer.config.block_size) == (2, 16)
    assert trainer.batches.next("train")[0].shape == (4, 16)
    assert trainer.model.config.dropout == 0.3  # may differ when resuming
    assert "n_layer = 2 comes from the loaded model (not 5)" in out.getvalue()


def test_resuming_on_other_characters_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    data_set(tmp_path, "an altogether different text, " * 50)
    with pytest.raises(ValueError, match="0021.pt was trained on .* characters that are not those"):
        Trainer(small_config(tmp_path, init_from="resume"))


def without_manifest(folder: Path) -> None:
    """Turn the folder into one of nanoGPT's prepare.py."""
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize("of_nanogpt", [False, True])
def test_resuming_on_other_data_of_the_same_characters(tmp_path: Path, of_nanogpt: bool) -> None:
    def prepared(text: str) -> Path:
        folder = data_set(tmp_path, text)
        if of_nanogpt:
            without_manifest(folder)
        return folder

    prepared(TEXT)
    trained(tmp_path)
    folder = prepared(TEXT[::-1])
    with pytest.raises(ValueError, match="0021.pt was trained on other data than .*small has"):
        Trainer(small_config(tmp_path, init_from="resume"), quiet())

    folder.rename(tmp_path / "other")  # as the message suggests
    out = io.StringIO()
    keys: dict[str, Any] = dict(dataset="other", init_from="resume", max_iters=30)
    trainer = Trainer(small_config(tmp_path, **keys), Console(file=out, width=300))
    assert "was trained on other data than" in out.getvalue()
    assert trainer.iter_num == 21 and trainer.best_val_loss == math.inf
    trainer.run()
    assert state_of(tmp_path)["best_val_loss"] < math.inf

    prepared(TEXT)  # preparing the same text again gives the same data
    shutil.rmtree(tmp_path / "out")
    trained(tmp_path)
    prepared(TEXT)
    out = io.StringIO()
    Trainer(small_config(tmp_path, init_from="resume"), Console(file=out, width=300))
    assert "other data" not in out.getvalue()


def test_a_checkpoint_that_does_not_know_its_data(tmp_path: Path) -> None:
    """A checkpoint written before fingerprints were saved."""
    trained(tmp_path)
    state = state_of(tmp_path)
    del state["fastgpt"]["data_fingerprint"]
    torch.save(state, tmp_path / "out" / "iter-0000021.pt")
    data_set(tmp_path, TEXT[::-1])
    assert Trainer(small_config(tmp_path, init_from="resume"), quiet()).iter_num == 21


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_the_gradient_scaler_is_resumed(tmp_path: Path) -> None:
    trainer = trained(tmp_path, device="cuda", dtype="float16")
    trainer.scaler.update(1024.0)
    trainer._save(publish=False)
    config = small_config(tmp_path, device="cuda", dtype="float16", init_from="resume")
    again = Trainer(config, quiet())
    assert again.scaler.get_scale() == 1024.0
    assert_same(again.scaler.state_dict(), trainer.scaler.state_dict())
