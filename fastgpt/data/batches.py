"""Token files and the batches drawn from them.

A data set is a folder with token files: ids in native byte order, no header. ``manifest.json``
names the files of each split, their lengths and their dtype (uint16 or uint32); without it, as in
nanoGPT, they are ``train.bin`` and ``val.bin`` in uint16.

    batches = Batches("data/shakespeare", batch_size=64, block_size=256, device="cuda", seed=1337)
    x, y = batches.next("train")                      # int64, (B, T), on the device
    for x, y in batches.evaluation("val", 200): ...   # the same 200 batches at every call
    saved = batches.state_dict()                      # goes through torch.load(weights_only=True)
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt._progress import spans
from fastgpt.data import manifest

SPLITS = ("train", "val")


class TokenFile:
    """One file of token ids, mapped into memory.

    Args:
        path: the file.
        dtype: ``"uint16"`` or ``"uint32"``.

    Attributes:
        path: the file.
        tokens: its ids, a read-only array of shape (N,).

    Raises:
        FileNotFoundError: there is no such file; the message names the command that makes it.
        ValueError: the file is empty or no whole number of ids.
    """

    def __init__(self, path: str | Path, dtype: str = "uint16") -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{self.path} is not a file. Make it from a text of your own with "
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
        """Read the whole file once, a few MB at a time.

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
        ValueError: ``split`` is neither "train" nor "val"; the manifest is damaged, or a file has
            another length than it says.
    """
    _check_split(split)
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


class Batches:
    """Random batches from the two splits of a data set.

    A batch is ``x = d[i : i + T]``, ``y = d[i + 1 : i + 1 + T]`` for B starts i, drawn uniformly by
    ``torch.randint`` from those that leave room for y within their file. Each split has its own
    generator, independent of the global one. The next batch is drawn ahead; on CUDA it is copied
    from pinned memory on a side stream while the GPU works.

    With several processes, batch k of the sequence that one process would draw goes to rank
    ``k % world_size``. Every rank draws all starts, so ``state_dict`` is the same on all ranks and
    for any number of them.

    Args:
        data_dir: the folder of the data set.
        batch_size: B.
        block_size: T.
        device: the device of the batches.
        seed: in [0, 2^63): train uses seed, val seed + 1, ``evaluation`` seed + 2.
        vocab_size: if given, all files are read once to check that every id lies below it.
        rank: of this process, in [0, world_size).
        world_size: the number of processes.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: batch_size, block_size or seed is no int.
        ValueError: a file is empty, has an odd size or holds an id that is too large; no file of a
            split has T + 1 tokens; the manifest is not usable (see ``token_files``); batch_size or
            block_size is below 1, or seed or rank out of range.
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
        _check_range("batch_size", batch_size, 1, 1 << 31)
        _check_range("block_size", block_size, 1, 1 << 31)
        _check_range("seed", seed, 0, 1 << 63)
        _check_range("world_size", world_size, 1, 1 << 31)
        _check_range("rank", rank, 0, world_size)
        self.batch_size, self.block_size = batch_size, block_size
        self.rank, self.world_size = rank, world_size
        self.device = torch.device(device)
        self._seed = seed
        # One stream for all copies: PyTorch's allocator keeps separate memory for each stream.
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._files = {split: token_files(data_dir, split) for split in SPLITS}
        for files in self._files.values():
            longest = max(files, key=len)
            if len(longest) < block_size + 1:
                raise ValueError(
                    f"{longest.path} has {len(longest)} tokens, but block_size={block_size} needs "
                    f"at least {block_size + 1}"
                )
            if vocab_size is not None:
                for file in files:
                    file.check_ids(vocab_size)
        self._cursors = {
            "train": self._cursor("train", seed),
            "val": self._cursor("val", seed + 1),
        }

    def next(self, split: str) -> tuple[Tensor, Tensor]:
        """The next batch of ``split`` ("train" or "val"): x and y, int64, (B, T), on the device."""
        _check_split(split)
        return self._cursors[split].next()

    def evaluation(self, split: str, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of ``count`` batches of ``split``: the same ones at every call, so
        that two losses differ by the model alone. ``next`` and ``state_dict`` are not affected.
        """
        _check_split(split)
        cursor = self._cursor(split, self._seed + 2)
        return (cursor.next() for _ in range(self.rank, count, self.world_size))

    def state_dict(self) -> dict[str, Tensor]:
        """The uint8 generator state of each split, from which its next batch is drawn."""
        return {split: cursor.state for split, cursor in self._cursors.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Continue exactly where ``state_dict`` was taken.

        Raises:
            ValueError: the entries are not those that ``state_dict`` returns.
        """
        if set(state_dict) != set(SPLITS):
            raise ValueError(
                f"state_dict must have the keys {list(SPLITS)}, got {sorted(state_dict)}"
            )
        for split, cursor in self._cursors.items():
            _check_generator_state(split, state_dict[split], like=cursor.state)
        for split, cursor in self._cursors.items():
            cursor.load(state_dict[split])

    def _cursor(self, split: str, seed: int) -> "_Cursor":
        return _Cursor(self, self._files[split], seed)


class _Cursor:
    """The random batches of one split, drawn one ahead.

    ``state`` is the generator's state before the batch that ``next`` will return, which is the
    pending one if there is one.
    """

    def __init__(self, batches: Batches, files: list[TokenFile], seed: int) -> None:
        self._batches = batches
        # For each file a view whose row i is the window tokens[i : i + T + 1]; legal starts are
        # numbered through all files.
        length = batches.block_size + 1
        self._windows = [
            np.lib.stride_tricks.sliding_window_view(file.tokens, length)
            for file in files
            if len(file) >= length
        ]
        self._ends = np.cumsum([len(windows) for windows in self._windows])
        self._generator = torch.Generator().manual_seed(seed)
        self._pending: Tensor | None = None
        self.state = self._generator.get_state()

    def next(self) -> tuple[Tensor, Tensor]:
        pending = self._prefetched() if self._pending is None else self._pending
        if (stream := self._batches.stream) is not None:
            current = torch.cuda.current_stream(self._batches.device)
            current.wait_stream(stream)
            pending.record_stream(current)  # or the side stream could reuse it while it is read
        self._pending = self._prefetched()
        x, y = pending
        return x, y

    def load(self, state: Tensor) -> None:
        self.state = state.cpu()
        self._generator.set_state(self.state)
        self._pending = None

    def _prefetched(self) -> Tensor:
        self.state = self._generator.get_state()
        pair, stream = self._draw(), self._batches.stream
        with torch.cuda.stream(stream):
            return pair.to(self._batches.device, non_blocking=stream is not None)

    def _draw(self) -> Tensor:
        """x and y as one int64 tensor (2, B, T) on the host, pinned where the device is a GPU."""
        batches = self._batches
        shape = (batches.world_size, batches.batch_size)
        starts = torch.randint(int(self._ends[-1]), shape, generator=self._generator)
        mine = starts[batches.rank].numpy()
        where = np.searchsorted(self._ends, mine, side="right")  # the file of each start
        pair = torch.empty(
            (2, batches.batch_size, batches.block_size),
            dtype=torch.int64,
            pin_memory=batches.stream is not None,
        )
        for i in np.unique(where):
            rows = where == i
            windows = self._windows[i][mine[rows] - (self._ends[i] - len(self._windows[i]))]
            pair.numpy()[0, rows] = windows[:, :-1]
            pair.numpy()[1, rows] = windows[:, 1:]
        return pair


def _check_range(name: str, value: int, low: int, limit: int) -> None:
    if type(value) is not int:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not low <= value < limit:
        raise ValueError(f"{name} must lie in [{low}, {limit}), got {value}")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")


def _check_generator_state(split: str, state: Tensor, like: Tensor) -> None:
    if not isinstance(state, Tensor) or state.dtype != like.dtype or state.shape != like.shape:
        raise ValueError(
            f"state_dict[{split!r}] must be a generator state ({like.dtype}, "
            f"shape {tuple(like.shape)}), got {type(state).__name__} {getattr(state, 'shape', '')}"
        )
