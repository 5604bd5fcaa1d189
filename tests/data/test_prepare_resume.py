"""An interrupted preparation resumes and gives the same files; a finished one is verified."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fastgpt.data import token_writer
from fastgpt.data.batches import token_files
from fastgpt.data.prepare import prepare
from fastgpt.data.sources import FileSource
from fastgpt.tokenizer import CharTokenizer, Tokenizer
from tests.data.test_prepare import DOCUMENTS, contents


class Stopping(CharTokenizer):
    """Raises KeyboardInterrupt at document ``stop_at``; records the texts it encoded."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__(dict(enumerate(sorted(set("".join(DOCUMENTS))))))
        self._stop = None if stop_at is None else DOCUMENTS[stop_at]
        self.encoded: list[str] = []

    def encode_array(self, text: str) -> npt.NDArray[Any]:
        if text == self._stop:
            raise KeyboardInterrupt
        self.encoded.append(text)
        return super().encode_array(text)


@pytest.mark.parametrize("shard_tokens", [97, 10**6])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_stopped_preparation_goes_on(
    workers: int, shard_tokens: int, source: FileSource, tmp_path: Path, small_batches: None
) -> None:
    def run(out_dir: Path, tokenizer: Tokenizer) -> None:
        prepare(
            source, tokenizer, out_dir, val_share=0.3, shard_tokens=shard_tokens, workers=workers
        )

    uninterrupted = Stopping()
    run(tmp_path / "a", uninterrupted)
    assert sorted(uninterrupted.encoded) == sorted(DOCUMENTS)
    saved = 0
    for stop_at in (20, 35, 50):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "b", Stopping(stop_at))
        work = tmp_path / "b" / ".prepare"
        state = json.loads((work / "state.json").read_text())
        assert state["batches"] > saved
        saved = state["batches"]
        # what a crash can leave beyond the saved state: a partial batch, another shard
        for path in work.glob("*.bin"):
            if path.stat().st_size < 2 * shard_tokens:
                with path.open("ab") as file:
                    file.write(b"torn")
        (work / "train_000900.bin").write_bytes(b"torn")
        with pytest.raises(FileNotFoundError):
            token_files(tmp_path / "b", "train")
    assert saved >= 8
    last = Stopping()
    run(tmp_path / "b", last)
    assert len(last.encoded) < 25  # documents already written are not encoded again
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert not (tmp_path / "b" / ".prepare").exists()


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX systems")
def test_two_at_a_time_are_refused(source: FileSource, tmp_path: Path) -> None:
    """Two processes would write into each other's shards."""

    class Second(Stopping):
        def encode_array(self, text: str) -> npt.NDArray[np.uint16]:
            with pytest.raises(ValueError, match="another process is writing to .*data"):
                prepare(source, Stopping(), tmp_path / "data", val_share=0.3)
            return super().encode_array(text)

    prepare(source, Second(), tmp_path / "data", val_share=0.3)
    prepare(source, Stopping(), tmp_path / "other", val_share=0.3)
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


@pytest.mark.parametrize("after", range(5))
def test_stopped_while_the_files_are_moved(
    after: int,
    source: FileSource,
    tokenizer: CharTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepare(source, tokenizer, tmp_path / "a", val_share=0.3)
    moved = 0
    move = os.replace

    def replace(source: Path, target: Path) -> None:
        nonlocal moved
        if target.parent == tmp_path / "b":
            if moved == after:
                raise KeyboardInterrupt
            moved += 1
        move(source, target)

    monkeypatch.setattr(token_writer.os, "replace", replace)
    if after < 4:  # train, val, tokenizer, manifest
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tokenizer, tmp_path / "b", val_share=0.3)
        monkeypatch.undo()
    prepare(source, tokenizer, tmp_path / "b", val_share=0.3)
    assert contents(tmp_path / "b") == contents(tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "b")) == sorted(contents(tmp_path / "a"))


def test_other_arguments_do_not_continue(
    source: FileSource, tmp_path: Path, small_batches: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(source, Stopping(30), tmp_path / "data", val_share=0.3, workers=1)
    tokenizer = Stopping()
    before = contents(tmp_path / "data" / ".prepare")
    with pytest.raises(ValueError, match="unfinished preparation with another val_share, seed"):
        prepare(source, tokenizer, tmp_path / "data", val_share=0.2, seed=9)
    assert contents(tmp_path / "data" / ".prepare") == before
    os.utime(tmp_path / "documents.jsonl", ns=(0, 0))
    with pytest.raises(ValueError, match="preparation with another source: finish it with"):
        prepare(source, tokenizer, tmp_path / "data", val_share=0.3)


def test_a_damaged_unfinished_one_is_noticed(
    source: FileSource, tmp_path: Path, small_batches: None
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(source, Stopping(30), tmp_path / "data", val_share=0.3, workers=1)
    (tmp_path / "data" / ".prepare" / "train_000000.bin").unlink()
    with pytest.raises(ValueError, match=r"train_000000\.bin must have at least \d+ bytes"):
        prepare(source, Stopping(), tmp_path / "data", val_share=0.3)
    state = tmp_path / "data" / ".prepare" / "state.json"
    whole = json.loads(state.read_text())
    for damaged in (
        {},
        {**whole, "settings": 3},
        {**whole, "tokens": [1]},
        {**whole, "batches": "x"},
    ):
        state.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=r"state\.json is damaged .* remove .* to start over"):
            prepare(source, Stopping(), tmp_path / "data", val_share=0.3)


def test_a_finished_one_is_checked_and_not_made_again(source: FileSource, tmp_path: Path) -> None:
    tokenizer = Stopping()
    manifest = prepare(source, tokenizer, tmp_path / "data", val_share=0.3)
    before = contents(tmp_path / "data")
    tokenizer.encoded.clear()
    assert prepare(source, tokenizer, tmp_path / "data", val_share=0.3) == manifest
    with pytest.raises(FileExistsError, match="data set with another val_share; choose another"):
        prepare(source, tokenizer, tmp_path / "data", val_share=0.4)
    assert contents(tmp_path / "data") == before and not tokenizer.encoded
    ids = np.memmap(tmp_path / "data" / "val.bin", dtype=np.uint16, mode="r+")
    ids[3] += 1
    ids.flush()
    with pytest.raises(ValueError, match=r"val\.bin is damaged: its SHA-256 is"):
        prepare(source, tokenizer, tmp_path / "data", val_share=0.3)
