"""A full disk: one line with cause and path, and nothing lost. It is simulated by a limit on file
size: writes fail in the same places, with EFBIG instead of ENOSPC.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.cli import main as cli
from fastgpt.training import checkpoint as ckpt
from tests.tools.forked import Forked
from tests.tools.small_runs import TEXT, arguments, data_set, small_keys

resource = pytest.importorskip("resource", reason="POSIX's limits")

_CAUSE = "error: File too large: "


def _limited(calls: tuple[tuple[int, list[str]], ...], stdout: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stdout = open(stdout, "w")
    for size, argv in calls:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        print("exit", cli.main(argv), file=sys.stderr)


def run(*calls: tuple[int, list[str]], stdout: str = os.devnull) -> list[str]:
    """stderr of commands, each given as (largest file size in bytes, arguments)."""
    return Forked(_limited, calls, stdout).finished().splitlines()


def test_train() -> None:
    """Several sizes, because PyTorch's zip writer fails in different ways."""
    data_set(Path())
    keys = small_keys(Path(), eval_interval=2, max_iters=3, out_dir="out")
    assert cli.main(["train", "--preset=gpt2", *arguments({**keys, "max_iters": 1})]) == 0
    before = {path: path.read_bytes() for path in Path("out").glob("*.pt")}
    whole = max(map(len, before.values()))
    resume = ["train", "--init_from=resume", "--max_iters=3"]
    sizes = [*range(4096, whole, whole // 8), whole - 40]
    printed = run(*((size, resume) for size in sizes))
    assert printed == [f"{_CAUSE}out/iter-0000002.pt", "exit 1"] * len(sizes)
    assert {path: path.read_bytes() for path in Path("out").glob("*.pt")} == before
    assert not list(Path("out").glob(".*"))
    (log_line, code) = run((100, resume))
    assert (log_line, code) == (f"{_CAUSE}out/log.jsonl", "exit 1")
    assert cli.main(resume) == 0
    assert ckpt.load(Path("out/iter-0000004.pt"))["iter_num"] == 4


def test_prepare_continues() -> None:
    Path("own.txt").write_text(TEXT * 400)
    command = ["prepare", "--input=own.txt"]
    assert run((1_000_000, command)) == [f"{_CAUSE}data/own/.prepare", "exit 1"]
    assert cli.main(command) == 0
    expected = Path("data/own/train.bin").read_bytes()
    shutil.rmtree("data")
    assert cli.main(command) == 0
    assert Path("data/own/train.bin").read_bytes() == expected


def test_export_and_sample() -> None:
    data_set(Path())
    keys = small_keys(Path(), max_iters=1, out_dir="out")
    assert cli.main(["train", "--preset=gpt2", *arguments(keys)]) == 0
    nanogpt, hf = ["export", "--to=nanogpt"], ["export", "--to=hf"]
    sample = ["sample", "--num_samples=40", "--max_new_tokens=40", "--start=1"]
    printed = run((5000, nanogpt), (100, hf), (200, hf), (9000, hf))
    assert printed[:2] == [f"{_CAUSE}out/.nanogpt.tmp/ckpt.pt", "exit 1"]
    assert len(printed) == 8 and all("File too large" in line for line in printed[::2])
    assert not Path("out/nanogpt").exists() and not Path("out/hf").exists()
    assert run((500, sample), stdout="samples") == [f"{_CAUSE}stdout", "exit 1"]
    assert torch.load("out/ckpt.pt")["iter_num"] == 2
