"""Token files while they are written: appended to, cut into shards, continued after a crash.

The folder ``work`` holds ``{split}_{number:06d}.bin`` and ``state.json``: how many batches of the
input are saved and how long each split was then. Opening the folder again truncates the files to
that state. ``finish`` renames everything to its place, the manifest last.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastgpt._files import parsed_json, sha256_of, sync_folder, write_json, writing
from fastgpt.data.manifest import NAME, Manifest, Shard, Split, read_manifest

_STATE = "state.json"
_SAVE_EVERY = 16  # batches


class ShardWriter:
    """The splits of a data set that is being written.

    Args:
        work: the folder, which is made or continued.
        settings: JSON values; a folder begun with other settings is not continued.
        dtype: ``"uint16"`` or ``"uint32"``.
        shard_tokens: the length of every shard but the last of a split.

    Attributes:
        batches: the number appended so far, those of an interrupted call included.
        tokens: the number of ids in each split.

    Raises:
        ValueError: the folder was begun with other settings, or lacks what its state says.
    """

    def __init__(self, work: Path, settings: dict[str, Any], dtype: str, shard_tokens: int) -> None:
        self._work, self._settings = work, settings
        self._dtype, self._shard_tokens = np.dtype(dtype), shard_tokens
        self._open: dict[str, BinaryIO] = {}
        self.batches = 0
        self.tokens = {"train": 0, "val": 0}
        self._documents = {"train": 0, "val": 0}
        work.mkdir(parents=True, exist_ok=True)
        if (work / _STATE).exists():
            self._continue()
        for split in self.tokens:
            self._cut(split)

    def append(
        self, ids: dict[str, npt.NDArray[np.integer[Any]]], documents: dict[str, int]
    ) -> None:
        """Add one batch: the ids of each split, and how many documents end in them."""
        for split, new in ids.items():
            while len(new):
                start = self.tokens[split] % self._shard_tokens
                part, new = np.split(new, [self._shard_tokens - start])
                with writing(self._work):
                    self._file(split).write(part.astype(self._dtype).data)
                self.tokens[split] += len(part)
                if start + len(part) == self._shard_tokens:
                    self._sync(split)
                    self._open.pop(split).close()
            self._documents[split] += documents[split]
        self.batches += 1
        if self.batches % _SAVE_EVERY == 0:
            self.save()

    def save(self) -> None:
        """Sync to the disk: a crash loses nothing that was appended before."""
        for split in self._open:
            self._sync(split)
        state = {
            "settings": self._settings,
            "batches": self.batches,
            "tokens": self.tokens,
            "documents": self._documents,
        }
        write_json(state, self._work / _STATE)

    def close(self) -> None:
        """Close the files, without saving. A folder that was never saved is removed."""
        while self._open:
            with contextlib.suppress(OSError):  # the disk is full: what was saved is on it
                self._open.popitem()[1].close()
        if self._work.exists() and not (self._work / _STATE).exists():
            shutil.rmtree(self._work)

    def finish(self, out_dir: Path, vocab_size: int, tokenizer: dict[str, str]) -> Manifest:
        """Rename the shards and the file ``tokenizer["file"]`` to ``out_dir``, the manifest last.

        Raises:
            ValueError: a split is empty.
        """
        for split, other in (("val", "train"), ("train", "val")):
            if not self.tokens[split]:
                # Another share or seed encodes everything again.
                (self._work / _STATE).unlink(missing_ok=True)
                self.close()
                raise ValueError(
                    f"nothing fell to {split}: all {self._documents[other]:,} documents went to "
                    f"{other}; choose another --val_share or --seed"
                )
        self.save()
        self.close()
        splits = {split: self._split(split) for split in self.tokens}
        dtype = self._dtype.name
        Manifest(dtype, vocab_size, tokenizer, splits, self._settings).write(self._work)
        return publish(self._work, out_dir)

    def _continue(self) -> None:
        path = self._work / _STATE
        try:
            state = parsed_json(path.read_text(encoding="utf-8"))
            begun = dict(state["settings"])
            self.batches = int(state["batches"])
            for key, counts in (("tokens", self.tokens), ("documents", self._documents)):
                counts.update({split: int(state[key][split]) for split in counts})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): remove {self._work} to start over"
            ) from error
        changed = [key for key, value in self._settings.items() if begun.get(key) != value]
        if changed:
            raise ValueError(
                f"{self._work} has an unfinished preparation with another "
                f"{', '.join(changed)}: finish it with the arguments it was begun with, or remove "
                "the folder to start over"
            )

    def _cut(self, split: str) -> None:
        """Truncate the files of ``split`` to what the state counts."""
        whole, rest = divmod(self.tokens[split], self._shard_tokens)
        lengths = [self._shard_tokens] * whole + [rest] * bool(rest)
        for number, length in enumerate(lengths):
            path, size = self._path(split, number), length * self._dtype.itemsize
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(
                    f"{path} should have {size} bytes and has not: remove {self._work} to start "
                    "over"
                )
            os.truncate(path, size)
        for path in sorted(self._work.glob(f"{split}_*.bin"))[len(lengths) :]:
            path.unlink()

    def _path(self, split: str, number: int) -> Path:
        return self._work / _shard_name(split, number)

    def _file(self, split: str) -> BinaryIO:
        if split not in self._open:
            number = self.tokens[split] // self._shard_tokens
            self._open[split] = self._path(split, number).open("ab")
        return self._open[split]

    def _sync(self, split: str) -> None:
        with writing(self._work):
            self._open[split].flush()
            os.fsync(self._open[split].fileno())

    def _split(self, split: str) -> Split:
        count = -(-self.tokens[split] // self._shard_tokens)
        shards = []
        for number in range(count):
            path = self._path(split, number)
            # nanoGPT reads {split}.bin as uint16.
            alone = count == 1 and self._dtype == np.uint16
            name = f"{split}.bin" if alone else path.name
            tokens = path.stat().st_size // self._dtype.itemsize
            shards.append(Shard(name, tokens, sha256_of(path)))
        return Split(self._documents[split], tuple(shards))


def publish(work: Path, out_dir: Path) -> Manifest:
    """Rename the finished files in ``work`` to ``out_dir``, or those that are still there."""
    manifest = read_manifest(work)
    assert manifest is not None
    places = {
        _shard_name(split, number): shard.file
        for split, found in manifest.splits.items()
        for number, shard in enumerate(found.shards)
    }
    places[manifest.tokenizer["file"]] = manifest.tokenizer["file"]
    for source, target in places.items():
        if (work / source).exists():
            os.replace(work / source, out_dir / target)
    sync_folder(out_dir)
    os.replace(work / NAME, out_dir / NAME)
    sync_folder(out_dir)
    shutil.rmtree(work)
    return manifest


def _shard_name(split: str, number: int) -> str:
    return f"{split}_{number:06d}.bin"
