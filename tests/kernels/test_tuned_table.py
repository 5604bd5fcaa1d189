"""Entries measured by ``fastgpt tune``: which launches use them, and which files are ignored."""

import itertools
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.kernels import _host, configs, tuned_table
from fastgpt.kernels.candidates import CANDIDATES, candidates, same
from fastgpt.kernels.configs import ANY, Attention, Elementwise, Gemm, Key

CPU = torch.device("cpu")
GPU = torch.device("cuda", 3)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LINE = Key("attention", "fwd", "sm_90", "half", 64, ("dropout",))
MEASURED = Attention(32, 16, 2, 1)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTGPT_TUNED", str(tmp_path))
    monkeypatch.setattr(configs, "_TUNED", {None: {}})
    with _host.interpreted(True, 90):
        yield


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be a machine with this GPU, as far as reading a file goes."""
    facts = {"gpu": "GPU X", "driver": "1.2", "torch": "2", "triton": "3", "kernels": "abc"}
    monkeypatch.setattr(tuned_table, "made_for", lambda device: facts)


def write(device: torch.device = CPU, **changes: Any) -> Path:
    """Write a valid file for the device, except for ``changes``."""
    held: dict[str, Any] = {
        "made_for": tuned_table.made_for(device),
        "lines": [{"key": LINE, "config": configs.encoded(MEASURED)}],
    }
    held = json.loads(json.dumps(held | changes))
    path = tuned_table.path_of(device)
    assert path is not None
    path.write_text(json.dumps({**held, "sha256": tuned_table.checksum(held)}))
    return path


def test_a_measured_line_is_for_exactly_its_launch() -> None:
    def found(dtype: torch.dtype, size: int, *options: str) -> Any:
        return configs.find(torch.empty(1, dtype=dtype), "attention", "fwd", size, *options)

    asked = list(itertools.product((BF16, FP16, FP32), (64, 128), ((), ("dropout",))))
    before = {one: found(one[0], one[1], *one[2]) for one in asked}
    write()
    assert {one: found(one[0], one[1], *one[2]) for one in asked} == before  # not read on a CPU
    configs.read_tuned(CPU)
    for dtype, size, options in asked:
        own = dtype != FP32 and size == 64 and options
        expected = MEASURED if own else before[dtype, size, options]
        assert found(dtype, size, *options) == expected
    with _host.interpreted(True, 80):  # a different architecture
        assert found(BF16, 64, "dropout") != MEASURED
    configs.tuned(CPU)[LINE] = "a library"  # takes effect immediately
    assert found(BF16, 64, "dropout") == "a library"
    configs.tuned(CPU)[LINE] = None  # None is an entry, too: no library
    assert found(BF16, 64, "dropout") is None


def test_a_gpus_file_is_read_once(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(GPU)
    assert path.name.startswith("GPU-X-")
    assert configs.tuned(GPU) == {LINE: MEASURED}
    path.unlink()
    assert configs.tuned(GPU) == {LINE: MEASURED}
    assert configs.tuned(torch.device("cuda", 4)) == {} == configs.tuned(CPU)
    assert configs.read_tuned(GPU) == {} == configs.tuned(GPU)


def _flipped(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace("32, 16", "32, 17"))
    assert path.read_text() != text


def _made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "empty": lambda path: path.write_bytes(b""),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "lists in lists": lambda path: path.write_text("[" * 100_000),
    "another number": _flipped,
    "a folder": _made_a_folder,
    "another GPU's": lambda path: write(made_for={**tuned_table.made_for(CPU), "gpu": "GPU Y"}),
    "an older PyTorch's": lambda path: write(made_for={**tuned_table.made_for(CPU), "torch": "1"}),
    "other kernels'": lambda path: write(made_for={**tuned_table.made_for(CPU), "kernels": "0"}),
    "made for nothing": lambda path: write(made_for=None),
    "an unknown kind": lambda path: write(lines=[{"key": LINE, "config": ["Key", 1, 2]}]),
    "a field too many": lambda path: write(
        lines=[{"key": LINE, "config": ["Elementwise", 1, 2, 3]}]
    ),
    "half a key": lambda path: write(lines=[{"key": ["gelu", []], "config": "cuBLAS"}]),
    "nothing for a key": lambda path: write(lines=[{"key": [], "config": "cuBLAS"}]),
    "no key": lambda path: write(lines=[{"config": "cuBLAS"}]),
    "no lines": lambda path: write(lines=3),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_cannot_be_used_is_ignored_with_one_notice(damage: str) -> None:
    path = write()
    DAMAGES[damage](path)
    said = "is ignored .*: fastgpt tune makes a new one"
    if damage == "a folder":
        said = "is ignored: Is a directory"
    with pytest.warns(UserWarning, match=f"^{path} {said}$") as notices:
        assert configs.read_tuned(CPU) == {}
    assert len(notices) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.find(torch.empty(1, dtype=BF16), "gelu", "fwd") == Elementwise(1024, 4)


def test_the_name_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {name: "a" for name in ("gpu", "driver", "torch", "triton", "kernels")}
    paths = set()
    for changed in ({}, *({name: "b"} for name in facts)):
        monkeypatch.setattr(tuned_table, "made_for", lambda device, c=changed: {**facts, **c})
        paths.add(tuned_table.path_of(GPU))
    assert len(paths) == 6 and {path.parent for path in paths if path} == {tmp_path}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTGPT_TUNED")
    assert tuned_table.folder() == tmp_path / "cache" / "fastgpt" / "tuned"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned_table.folder() == tmp_path / ".cache" / "fastgpt" / "tuned"
    monkeypatch.setenv("FASTGPT_TUNED", "~nobody-has-this-name/tuned")
    assert tuned_table.folder() is None
    monkeypatch.setenv("FASTGPT_TUNED", "")
    assert tuned_table.folder() is None and tuned_table.path_of(GPU) is None
    assert tuned_table.read(GPU) == {}


def test_configurations_survive_a_file() -> None:
    """Equal tuples of different types keep their types."""
    assert not same(configs.WholeRows(8, 4), configs.AttentionDecodeSum(8, 4))
    lines = [*configs.TABLE.values(), *itertools.chain(*CANDIDATES.values()), "cuDNN"]
    for config in lines:
        again = configs.decoded(json.loads(json.dumps(configs.encoded(config))))
        assert same(again, config) and hash(again) == hash(config)
    for key in (*configs.TABLE, *CANDIDATES):
        assert same(configs.decoded_key(json.loads(json.dumps(key))), key)


@pytest.mark.parametrize("key", CANDIDATES, ids=str)
def test_candidates_are_two_to_eight_of_which_the_first_is_the_tables(key: Key) -> None:
    """For every architecture and dtype that the entry serves."""
    archs = {"sm_80": (80, 86, 89, 120), "sm_90": (90,), "sm_100": (100,)}
    capabilities = archs.get(key.arch, tuple(itertools.chain(*archs.values())))
    dtypes = (BF16, FP16) if key.dtype == "half" else (BF16, FP16, FP32)
    kernels = ("fwd", "bwd") if key.kernel == ANY else (key.kernel,)
    for capability, dtype, kernel in itertools.product(capabilities, dtypes, kernels):
        asked = key.op, kernel, capability, dtype, key.size, key.options
        found = candidates(*asked)
        assert 2 <= len(found) <= 8 and same(found[0], configs.lookup(*asked))
        assert len({(type(one), one) for one in found}) == len(found)


def test_what_has_no_candidates_keeps_its_line() -> None:
    without: list[tuple[Any, ...]] = [
        ("attention", "fwd", 90, FP32, 64),
        ("gemm", "fwd", 90, FP32, 1024),
        ("attention_decode", "fwd", 90, BF16, 64),
        ("fp8", "quantise", 90, BF16),
        ("attention", "fwd", None, BF16, 64),
        *(("gemm", kernel, 75, FP16, 1024) for kernel in ("fwd", "bwd", "weight")),
        ("gemm", "bwd", 75, FP16, 1024, ("recompute",)),
        ("gemm", "weight", 75, FP16, 1024, ("bias",)),
    ]
    for asked in without:
        assert candidates(*asked) == [configs.lookup(*asked)]
    assert configs.CUBLAS in candidates("gemm", "fwd", 100, BF16, 1024)
    assert isinstance(candidates("gemm", "fwd", 90, BF16, 1024)[1], Gemm)
