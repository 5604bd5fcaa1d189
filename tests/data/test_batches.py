"""Batches against a plain implementation, exact resuming, and bad files."""

import io
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgpt import _progress
from fastgpt.data import manifest
from fastgpt.data.batches import SPLITS, Batches, TokenFile, fingerprint
from tests.tools.small_runs import data_set

BATCH, BLOCK, SEED, VOCAB = 5, 7, 1337, 1000
LENGTHS = {"train": 400, "val": 60}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, length in LENGTHS.items():
        rng.integers(VOCAB, size=length, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    return tmp_path


def make(data_dir: Path, device: str = "cpu", **changes: Any) -> Batches:
    arguments = {"batch_size": BATCH, "block_size": BLOCK, "seed": SEED} | changes
    return Batches(data_dir, device=device, **arguments)


def expected(data_dir: Path, split: str, seed: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Plain implementation: starts below len - T, x the T ids from there, y shifted by one."""
    d = np.fromfile(data_dir / f"{split}.bin", dtype=np.uint16).astype(np.int64)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        starts = torch.randint(len(d) - BLOCK, (BATCH,), generator=generator).tolist()
        x = np.stack([d[i : i + BLOCK] for i in starts])
        y = np.stack([d[i + 1 : i + 1 + BLOCK] for i in starts])
        batches.append((torch.from_numpy(x), torch.from_numpy(y)))
    return batches


def assert_same(got: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> None:
    assert len(got) == len(want)
    for (x, y), (x_want, y_want) in zip(got, want, strict=True):
        assert torch.equal(x.cpu(), x_want.cpu()) and torch.equal(y.cpu(), y_want.cpu())


def test_batches_follow_the_rule(data_dir: Path, device: str) -> None:
    batches = make(data_dir, device, vocab_size=VOCAB)
    # Keep all batches until the end: memory reused too early would show.
    train = [batches.next("train") for _ in range(50)]
    val = [batches.next("val") for _ in range(50)]
    for x, y in train + val:
        for tensor in (x, y):
            assert tensor.dtype == torch.int64 and tensor.shape == (BATCH, BLOCK)
            assert tensor.device.type == device and tensor.is_contiguous()
    assert_same(train, expected(data_dir, "train", SEED, 50))
    assert_same(val, expected(data_dir, "val", SEED + 1, 50))


def test_a_batch_goes_where_it_is_asked_to(data_dir: Path, device: str) -> None:
    """A batch overwrites the previous one only after the work on that has finished."""
    batches = make(data_dir, device)
    place = tuple(torch.empty(BATCH, BLOCK, dtype=torch.int64, device=device) for _ in range(2))
    copies = []
    for _ in range(20):
        assert batches.next("train", place) is place  # type: ignore[arg-type]
        copies.append((place[0].clone(), place[1].clone()))
    assert_same(copies, expected(data_dir, "train", SEED, 20))


def test_evaluation_repeats_itself_and_moves_nothing(data_dir: Path, device: str) -> None:
    batches = make(data_dir, device)
    train = [batches.next("train") for _ in range(3)]
    for split in SPLITS:
        first = list(batches.evaluation(split, 4))
        assert_same(first, expected(data_dir, split, SEED + 2, 4))
        assert_same(list(batches.evaluation(split, 4)), first)
    torch.rand(10)  # the global generator has no influence
    train += [batches.next("train") for _ in range(3)]
    assert_same(train, expected(data_dir, "train", SEED, 6))


@pytest.mark.parametrize("drawn", [0, 1, 4])
def test_a_restored_run_draws_what_the_uninterrupted_one_drew(
    drawn: int, data_dir: Path, device: str
) -> None:
    batches = make(data_dir, device)
    for split in SPLITS:
        for _ in range(drawn):
            batches.next(split)
    file = io.BytesIO()
    torch.save(batches.state_dict(), file)
    uninterrupted = {split: [batches.next(split) for _ in range(3)] for split in SPLITS}

    file.seek(0)
    state = torch.load(file, weights_only=True, map_location=device)
    restored = make(data_dir, device, seed=SEED + 99)
    restored.next("train")  # leaves a prefetched batch, which must be dropped
    restored.load_state_dict(state)
    for split in SPLITS:
        assert_same([restored.next(split) for _ in range(3)], uninterrupted[split])
    restored.load_state_dict(state)  # ``state`` does not alias what the run changes
    assert_same([restored.next("train")], uninterrupted["train"][:1])


def test_a_missing_file_names_the_command_that_makes_it(data_dir: Path) -> None:
    (data_dir / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.bin .*'fastgpt prepare --input FILE"):
        make(data_dir)
    with pytest.raises(FileNotFoundError, match=r"nowhere.train\.bin"):
        make(data_dir / "nowhere")


@pytest.mark.parametrize("size", [0, 1, 801])
def test_a_file_of_no_whole_tokens_is_refused(size: int, data_dir: Path) -> None:
    (data_dir / "train.bin").write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"train\.bin has {size} bytes, .* 2 bytes each"):
        make(data_dir)


def test_a_file_shorter_than_a_window_is_refused(data_dir: Path) -> None:
    make(data_dir, block_size=LENGTHS["val"] - 1)
    with pytest.raises(ValueError, match=r"val\.bin has 60 tokens, .*block_size=60 .* least 61"):
        make(data_dir, block_size=LENGTHS["val"])


@pytest.mark.parametrize("position", [0, 29, 59])
def test_an_id_outside_the_vocabulary_is_found(
    position: int, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_progress, "SPAN", 11)
    tokens = np.full(60, VOCAB - 1, dtype=np.uint16)
    tokens.tofile(data_dir / "val.bin")
    make(data_dir, vocab_size=VOCAB)
    tokens[position:] = VOCAB
    tokens.tofile(data_dir / "val.bin")
    with pytest.raises(
        ValueError, match=rf"val\.bin holds the token id 1000 at position {position}, .*size=1000"
    ):
        make(data_dir, vocab_size=VOCAB)
    make(data_dir)  # without vocab_size nothing is checked


def test_the_largest_id_of_uint16_is_usable(data_dir: Path) -> None:
    np.full(60, 65535, dtype=np.uint16).tofile(data_dir / "val.bin")
    x, _ = make(data_dir, vocab_size=65536).next("val")
    assert int(x.min()) == 65535
    make(data_dir, vocab_size=70000)
    with pytest.raises(ValueError, match="token id 65535 at position 0"):
        make(data_dir, vocab_size=65535)


def test_checking_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    np.zeros(24 << 20, dtype=np.uint16).tofile(path)  # 48 MB
    tracemalloc.start()
    TokenFile(path).check_ids(1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_largest_seed_is_usable(data_dir: Path) -> None:
    batches = make(data_dir, seed=2**63 - 1)
    assert_same([batches.next("val")], expected(data_dir, "val", 2**63, 1))
    assert len(list(batches.evaluation("val", 2))) == 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_the_batches_of_one(tmp_path: Path, world_size: int) -> None:
    folder = data_set(tmp_path)
    alone = Batches(folder, 4, 16, "cpu", 1)
    ranks = [Batches(folder, 4, 16, "cpu", 1, None, rank, world_size) for rank in range(world_size)]
    for _ in range(5):
        for batches in ranks:
            for mine, expected in zip(batches.next("train"), alone.next("train"), strict=True):
                assert torch.equal(mine, expected)
    states = [batches.state_dict()["train"] for batches in ranks]
    assert all(torch.equal(state, alone.state_dict()["train"]) for state in states)
    # 7 batches do not divide evenly among the ranks
    shares = [list(batches.evaluation("val", 7)) for batches in ranks]
    for number, (x, _) in enumerate(alone.evaluation("val", 7)):
        assert torch.equal(shares[number % world_size][number // world_size][0], x)
    assert sum(map(len, shares)) == 7


def test_the_fingerprint_is_that_of_the_tokens(data_dir: Path) -> None:
    first = fingerprint(data_dir)
    assert fingerprint(str(data_dir)) == first and len(first) == 64
    for split, length in LENGTHS.items():
        tokens = np.fromfile(data_dir / f"{split}.bin", dtype=np.uint16)
        for changed in (np.append(tokens, tokens[:1]), tokens ^ (np.arange(length) == length - 1)):
            changed.astype(np.uint16).tofile(data_dir / f"{split}.bin")
            assert fingerprint(data_dir) != first
        tokens.tofile(data_dir / f"{split}.bin")
    assert fingerprint(data_dir) == first
    (data_dir / "val.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"val\.bin"):
        fingerprint(data_dir)


# ---- data sets of several files


def write_shards(folder: Path, lengths: dict[str, list[int]], dtype: str, high: int) -> Path:
    """Write files of these lengths with random ids below ``high``, and their manifest."""
    rng = np.random.default_rng(1)
    splits = {}
    for split, counts in lengths.items():
        found = []
        for i, count in enumerate(counts):
            path = folder / f"{split}_{i}.bin"
            rng.integers(high, size=count, dtype=dtype).tofile(path)
            found.append(manifest.Shard(path.name, count, manifest.sha256_of(path)))
        splits[split] = manifest.Split(1, tuple(found))
    manifest.Manifest(dtype, high, {}, splits, {}).write(folder)
    return folder


@pytest.mark.parametrize(("dtype", "high"), [("uint16", 1000), ("uint32", 200_000)])
def test_windows_of_all_shards_and_none_across_two(
    dtype: str, high: int, tmp_path: Path, device: str
) -> None:
    lengths = {"train": [BLOCK + 3, 2, BLOCK + 1, BLOCK, 40], "val": [1, 30]}
    write_shards(tmp_path, lengths, dtype, high)
    shards = [np.fromfile(tmp_path / f"train_{i}.bin", dtype) for i in range(5)]
    windows = [
        shard[i : i + BLOCK + 1].astype(np.int64)
        for shard in shards
        for i in range(max(len(shard) - BLOCK, 0))
    ]
    generator = torch.Generator().manual_seed(SEED)
    batches = make(tmp_path, device, batch_size=50, vocab_size=high)
    for _ in range(4):
        starts = torch.randint(len(windows), (50,), generator=generator).tolist()
        rows = torch.from_numpy(np.stack([windows[i] for i in starts]))
        assert_same([batches.next("train")], [(rows[:, :-1], rows[:, 1:])])
    x, _ = batches.next("val")
    assert x.max() < high


def test_shards_that_are_not_those_of_the_manifest(tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": [50, 50], "val": [50]}, "uint16", 9)
    make(tmp_path, block_size=49)
    with pytest.raises(ValueError, match=r"has 50 tokens, but block_size=50 needs at least 51"):
        make(tmp_path, block_size=50)
    np.full(50, 9, dtype=np.uint16).tofile(tmp_path / "train_1.bin")
    with pytest.raises(ValueError, match=r"train_1\.bin holds the token id 9 at position 0"):
        make(tmp_path, vocab_size=9)
    np.zeros(49, dtype=np.uint16).tofile(tmp_path / "train_1.bin")
    with pytest.raises(
        ValueError, match=r"train_1\.bin has 49 tokens, but .*manifest.json says 50"
    ):
        make(tmp_path)
    (tmp_path / "train_1.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_1\.bin is not a file"):
        make(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{", ""),
        ('"version": 1', '"version": 2'),
        ('"dtype": "uint16"', '"dtype": "uint8"'),
        ('"settings"', '"other"'),
        ('"train_0.bin"', '"../train_0.bin"'),
        ('"val": {', '"test": {'),
        (" 50,", ' "50",'),
    ],
)
def test_a_damaged_manifest_is_named(old: str, new: str, tmp_path: Path) -> None:
    write_shards(tmp_path, {"train": [50], "val": [50]}, "uint16", 9)
    path = tmp_path / "manifest.json"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=r"manifest\.json is not a usable manifest"):
        make(tmp_path)
    for text in ("[]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json is not a usable manifest"):
            make(tmp_path)
