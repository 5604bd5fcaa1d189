"""Token files and the batches drawn from them.

A data set is a folder with token files: ids in native byte order, no header. ``manifest.json``
names the files of each split, their lengths and their dtype (uint16 or uint32); without it, as in
nanoGPT, they are ``train.bin`` and ``val.bin`` in uint16.

    batches = Batches("data/shakespeare", batch_size=64, block_size=256, device="cuda", seed=1337)
    x, y = batches.next("train")                      # int64, (B, T), on the device
    for x, y in batches.evaluation("val", 200): ...   # the same 200 batches at every call
    saved = batches.state_dict()                      # loads with torch.load(weights_only=True)
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt._progress import spans
from fastgpt.assistant.windows import DialogueWindows
from fastgpt.data import manifest

SPLITS = ("train", "val")

_PIECE, _PIECES = 4096, 1024  # bytes per piece and pieces per file that a fingerprint reads

Batch = tuple[Tensor, Tensor]


class TokenFile:
    """One file of token ids, mapped into memory.

    Args:
        path: the file.
        dtype: ``"uint16"`` or ``"uint32"``.

    Attributes:
        path: the file.
        tokens: its ids, a read-only array of shape (N,).

    Raises:
        FileNotFoundError: there is no such file; the message names the command that creates it.
        ValueError: the file is empty, or its size is not a multiple of an id's.
    """

    def __init__(self, path: str | Path, dtype: str = "uint16") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} is not a file. Create it from your own text with "
                f"'fastgpt prepare --input FILE --out_dir {self.path.parent}', or from the "
                f"built-in corpus with 'fastgpt prepare --out_dir {self.path.parent}'"
            )
        size, itemsize = self.path.stat().st_size, np.dtype(dtype).itemsize
        if size == 0 or size % itemsize:
            raise ValueError(
                f"{self.path} has {size} bytes, but must hold at least one token id of {itemsize} "
                f"bytes each ({dtype})"
            )
        self.tokens: np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]] = np.memmap(
            self.path, dtype=dtype, mode="r"
        )

    def __len__(self) -> int:
        return len(self.tokens)

    def check_ids(self, vocab_size: int) -> None:
        """Read the whole file, a few MB at a time, and check every id.

        Raises:
            ValueError: an id is not below ``vocab_size``.
        """
        if vocab_size > np.iinfo(self.tokens.dtype).max:
            return
        for span in spans(len(self), f"Checking {self.path.name}"):
            chunk = self.tokens[span]
            if chunk.max() >= vocab_size:
                offset = int(np.argmax(chunk >= vocab_size))
                raise ValueError(
                    f"{self.path} holds the token id {chunk[offset]} at position "
                    f"{span.start + offset}, but ids must lie below vocab_size={vocab_size}"
                )


def token_files(data_dir: str | Path, split: str) -> list[TokenFile]:
    """The token files of ``split`` in order: those of the manifest, or ``{split}.bin`` without one.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the manifest is damaged, or the length of a file differs from it.
    """
    folder = Path(data_dir)
    found = manifest.read_manifest(folder)
    if found is None:
        return [TokenFile(folder / f"{split}.bin")]
    shards = found.splits[split].shards
    files = [TokenFile(folder / shard.file, found.dtype) for shard in shards]
    for file, shard in zip(files, shards, strict=True):
        if len(file) != shard.tokens:
            raise ValueError(
                f"{file.path} has {len(file)} tokens, but {folder / manifest.NAME} says "
                f"{shard.tokens}: it is not the file that was prepared"
            )
    return files


def fingerprint(data_dir: str | Path) -> str:
    """SHA-256 in hex of the data: the files of both splits in order. With a manifest, hashes its
    checksums; without one, the size and at most 1024 evenly spaced pieces of 4 KiB of each file,
    because reading OpenWebText's 18 GB would take a while.

    Raises like ``token_files``.
    """
    digest = hashlib.sha256()
    found = manifest.read_manifest(data_dir)
    for split in SPLITS:
        files = token_files(data_dir, split)
        if found is not None:
            digest.update(f"{split} {found.dtype}".encode())
            digest.update("".join(shard.sha256 for shard in found.splits[split].shards).encode())
            continue
        for file in files:
            data = file.tokens.view(np.uint8)
            digest.update(f"{split} {len(data)}".encode())
            step = max(len(data) // _PIECES, _PIECE)
            for start in range(0, len(data), step):
                digest.update(data[start : start + _PIECE].tobytes())
    return digest.hexdigest()


class Batches:
    """Random batches from the two splits of a data set.

    A batch is ``x = d[i : i + T]``, ``y = d[i + 1 : i + 1 + T]`` for B starts i, each drawn by
    ``torch.randint`` over all starts that leave room for y within their file. Each split has its
    own generator, seeded here and independent of all others. On CUDA a batch is copied from pinned
    memory to the device in one asynchronous copy on the current stream.

    In a data set of dialogues (see ``manifest``) all starts are beginnings of dialogues, and y is
    -1 where the next token is not part of an answer.

    In a distributed run the processes share the batches that a single one would draw: of each
    ``world_size`` consecutive batches the process of rank r uses number r. All ranks draw all
    starts, so their ``state_dict`` is the same and does not depend on the number of processes.

    Args:
        data_dir: the folder of the data set.
        batch_size: B.
        block_size: T.
        device: the device of the batches.
        seed: in [0, 2^63): train uses seed, val seed + 1, ``evaluation`` seed + 2.
        vocab_size: if given, all files are read once to check that every id is below it.
        rank: rank of this process, in [0, world_size).
        world_size: the number of processes.

    Attributes:
        of_dialogues: whether the data set consists of dialogues.
        note: a note for the user if dialogues are longer than T + 1, else None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: batch_size is below 1; a file is empty, has a wrong size or contains an id that
            is too large; no file of a split has T + 1 tokens, or no dialogue has an answer within
            them; the manifest is not usable (see ``token_files``).
    """

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int,
        block_size: int,
        device: str | torch.device,
        seed: int,
        vocab_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._rank, self._world_size = rank, world_size
        self._batch_size = batch_size
        self._block_size = block_size
        self._device = torch.device(device)
        self._on_gpu = self._device.type == "cuda"
        self._seed = seed
        self.note: str | None = None
        self._too_long = 0  # number of dialogues, in both splits
        # For each file an array whose row i is the window tokens[i : i + T + 1], one row per valid
        # start. Starts are numbered through all files.
        self._windows: dict[str, list[np.ndarray[Any, Any]] | list[DialogueWindows]] = {}
        found = manifest.read_manifest(data_dir)
        self.of_dialogues = found is not None and found.dialogues
        for split in SPLITS:
            files = token_files(data_dir, split)
            if vocab_size is not None:
                for file in files:
                    file.check_ids(vocab_size)
            if found is not None and self.of_dialogues:
                self._windows[split] = self._of_dialogues(files, found.settings["end_of_text"])
                continue
            longest = max(files, key=len)
            if len(longest) < block_size + 1:
                raise ValueError(
                    f"{longest.path} has {len(longest)} tokens, but block_size={block_size} needs "
                    f"at least {block_size + 1}"
                )
            self._windows[split] = [
                np.lib.stride_tricks.sliding_window_view(file.tokens, block_size + 1)
                for file in files
                if len(file) > block_size
            ]
        self._generators = {
            split: torch.Generator().manual_seed(seed + number)
            for number, split in enumerate(SPLITS)
        }

    def _of_dialogues(self, files: list[TokenFile], begin: int) -> list[DialogueWindows]:
        length = self._block_size + 1
        windows: list[DialogueWindows] = []
        after = files[-1].tokens[:0]
        for file in reversed(files):
            windows.insert(0, DialogueWindows(file.tokens, length, begin, after))
            after = np.append(file.tokens[:length], after)[:length]
        if not any(map(len, windows)):
            raise ValueError(
                f"{files[0].path} has no dialogue with an answer within block_size="
                f"{self._block_size} tokens"
            )
        self._too_long += sum(of_file.too_long for of_file in windows)
        if self._too_long:
            self.note = (
                f"{self._too_long:,} dialogues are longer than block_size={self._block_size} "
                "tokens: their ends are cut off"
            )
        return windows

    def next(self, split: str, out: Batch | None = None) -> Batch:
        """The next batch of ``split`` ("train" or "val"): x and y, int64, (B, T), on the device.
        If ``out`` is given, such a pair, it is filled and returned.
        """
        pair = self._drawn(split, self._generators[split])
        if out is not None:
            for target, source in zip(out, pair, strict=True):
                target.copy_(source, non_blocking=self._on_gpu)
            return out
        return self._to_device(pair)

    def evaluation(self, split: str, count: int) -> Iterator[Batch]:
        """This process's share of ``count`` batches of ``split``, the same ones at every call, so
        that losses differ only by the model. Independent of ``next`` and of ``state_dict``.
        """
        generator = torch.Generator().manual_seed(self._seed + 2)
        mine = range(self._rank, count, self._world_size)
        return (self._to_device(self._drawn(split, generator)) for _ in mine)

    def _to_device(self, pair: Tensor) -> Batch:
        x, y = pair.to(self._device, non_blocking=self._on_gpu)
        return x, y

    def state_dict(self) -> dict[str, Tensor]:
        """The uint8 state of each split's generator before the next batch."""
        return {split: generator.get_state() for split, generator in self._generators.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Continue exactly from where ``state_dict`` was taken.

        Raises:
            KeyError, TypeError, RuntimeError: the entries are not those of ``state_dict``.
        """
        for split, generator in self._generators.items():
            generator.set_state(state_dict[split].cpu())

    def _drawn(self, split: str, generator: torch.Generator) -> Tensor:
        """x and y as one int64 tensor (2, B, T) on the host, in pinned memory if on a GPU."""
        files = self._windows[split]
        ends = np.cumsum([len(windows) for windows in files])
        shape = (self._world_size, self._batch_size)
        starts = torch.randint(int(ends[-1]), shape, generator=generator).numpy()[self._rank]
        where = np.searchsorted(ends, starts, side="right")  # the file of each start
        pair = torch.empty(
            (2, self._batch_size, self._block_size), dtype=torch.int64, pin_memory=self._on_gpu
        )
        for i in np.unique(where):
            rows = where == i
            file = files[i]
            windows = file[starts[rows] - (ends[i] - len(file))]
            pair.numpy()[0, rows] = windows[:, :-1]
            masked = isinstance(file, DialogueWindows)
            pair.numpy()[1, rows] = file.targets(windows) if masked else windows[:, 1:]
        return pair


def padded(rows: Sequence[Sequence[int]], value: int, device: torch.device | str = "cpu") -> Tensor:
    """Rows of any lengths as int64 (B, T), shorter ones padded with ``value``."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)
