"""Which checkpoint a run resumes from, errors for damaged ones, removal of old ones."""

from pathlib import Path

import pytest
import torch

from fastgpt.training import checkpoint_folder
from fastgpt.training.distributed import ALONE
from fastgpt.training.sharded_checkpoint import save
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import data_set, quiet, small_config, state_of, trained


@pytest.fixture(autouse=True)
def small_data(tmp_path: Path) -> Path:
    return data_set(tmp_path)


def test_the_file_with_more_iterations_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no ckpt.pt or iter-.*.pt in"):
        checkpoint_folder.newest(tmp_path)
    torch.save({"iter_num": 10}, tmp_path / "ckpt.pt")
    assert checkpoint_folder.newest(tmp_path).name == "ckpt.pt"
    for iterations, newest in ((9, "ckpt.pt"), (10, "iter-0000010.pt"), (11, "iter-0000011.pt")):
        torch.save({"iter_num": iterations}, checkpoint_folder.path_of(tmp_path, iterations, False))
        assert checkpoint_folder.newest(tmp_path).name == newest


def test_a_damaged_checkpoint_names_the_newest_intact_one(tmp_path: Path) -> None:
    trained(tmp_path, keep_last=9)
    out, config = tmp_path / "out", small_config(tmp_path, init_from="resume")
    names = ("ckpt.pt", "iter-0000021.pt", "iter-0000020.pt", "iter-0000010.pt")
    for name, intact in zip(names, (*names[1:], None), strict=True):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[: len(whole) // 2])
        advice = f"newest intact checkpoint is {out / intact}: remove" if intact else "No intact"
        with pytest.raises(ValueError, match=f"ckpt.pt is not a .* damaged: .*{advice}"):
            Trainer(config, quiet())
    (out / "ckpt.pt").unlink()
    with pytest.raises(ValueError, match="0021.pt is not .* damaged: .*No intact checkpoint"):
        Trainer(config, quiet())


def test_a_damaged_folder_names_the_newest_intact_one(tmp_path: Path) -> None:
    """The intact one may be a file if the run was not sharded before."""
    trained(tmp_path)
    out, state = tmp_path / "out", state_of(tmp_path)
    for iteration in (30, 40):
        save({**state, "iter_num": iteration}, out / f"iter-{iteration:07d}", ALONE)
    config = small_config(tmp_path, init_from="resume")
    assert Trainer(config, quiet()).iter_num == 40
    for damaged, intact in ((40, "iter-0000030"), (30, "iter-0000021.pt")):
        (out / f"iter-{damaged:07d}" / "__0_0.distcp").unlink()
        message = f"iter-0000040 is not a complete .*__0_0.distcp.* intact .* {out / intact}:"
        with pytest.raises(ValueError, match=message):
            Trainer(config, quiet())
    for damaged in (40, 30):
        checkpoint_folder.remove(out / f"iter-{damaged:07d}")
    assert Trainer(config, quiet()).iter_num == 21


def test_what_stands_beside_the_checkpoints_is_left_alone(tmp_path: Path) -> None:
    names = ["iter-0000001.pt", "iter-0000002", "iter-0000003.pt", "iter-0000004", "ckpt.pt"]
    others = [".iter-0000005.pt.tmp", "iter-6.txt", "iter-best.pt", "notes"]
    for name in names + others:
        (tmp_path / name).mkdir()
    checkpoint_folder.prune(tmp_path, 2, best_iter=1)
    left = {path.name for path in tmp_path.iterdir()} - {"small", "small.txt"}
    assert left == {*names, *others} - {"iter-0000002"}


def test_an_earlier_run_is_archived(tmp_path: Path) -> None:
    out = trained(tmp_path).out_dir
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"ckpt.pt", "iter-0000020.pt", "iter-0000021.pt", "log.jsonl"} <= before.keys()
    (out / "tensorboard").mkdir()
    for number in (1, 2):
        trained(tmp_path, seed=number)
        assert (out / f"previous-{number}").is_dir()
    for name, content in before.items():
        assert (out / "previous-1" / name).read_bytes() == content
    assert (out / "previous-1" / "tensorboard").is_dir()
    assert checkpoint_folder.archive_previous_run(tmp_path / "nowhere") is None
