"""Writes token files in shards, and resumes after a crash.

The folder ``work`` contains ``{split}_{number:06d}.bin`` and ``state.json``: the number of saved
batches of the input and the length of each split at that point. Opening the folder again truncates
the files to that state. ``finish`` moves everything to its final place, the manifest last.
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
    """Writes the splits of a data set.

    Args:
        work: the folder, which is created or resumed.
        settings: JSON values; a folder begun with other settings is not resumed.
        dtype: ``"uint16"`` or ``"uint32"``.
        shard_tokens: the length of every shard but the last of a split.

    Attributes:
        batches: the number of batches appended so far, including those of an interrupted call.
        tokens: the number of ids in each split.

    Raises:
        ValueError: the folder was begun with other settings, or does not match its state.
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
            self._resume()
        for split in self.tokens:
            self._cut(split)

    def append(
        self, ids: dict[str, npt.NDArray[np.integer[Any]]], documents: dict[str, int]
    ) -> None:
        """Append one batch: the ids of each split, and the number of documents that end in them."""
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
        """Sync to disk. A crash after this loses nothing that was appended before."""
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
        """Close the files without saving. Removes a folder that was never saved."""
        while self._open:
            with contextlib.suppress(OSError):  # the disk is full; the saved state is not affected
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
                # Another share or seed starts over anyway.
                (self._work / _STATE).unlink(missing_ok=True)
                self.close()
                raise ValueError(
                    f"{split} would be empty: all {self._documents[other]:,} documents are in "
                    f"{other}; choose another --val_share or --seed"
                )
        self.save()
        self.close()
        splits = {split: self._split(split) for split in self.tokens}
        dtype = self._dtype.name
        Manifest(dtype, vocab_size, tokenizer, splits, self._settings).write(self._work)
        return publish(self._work, out_dir)

    def _resume(self) -> None:
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
                f"{', '.join(changed)}: finish it with the original arguments, or remove the "
                "folder to start over"
            )

    def _cut(self, split: str) -> None:
        """Truncate the files of ``split`` to the lengths in the saved state."""
        whole, rest = divmod(self.tokens[split], self._shard_tokens)
        lengths = [self._shard_tokens] * whole + [rest] * bool(rest)
        for number, length in enumerate(lengths):
            path, size = self._path(split, number), length * self._dtype.itemsize
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(
                    f"{path} must have at least {size} bytes: remove {self._work} to start over"
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
    """Move the finished files that are still in ``work`` to ``out_dir``."""
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
