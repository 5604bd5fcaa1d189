"""`fastgpt train` in subprocesses, single or by torchrun, to be stopped or killed."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.tools.small_runs import HANGS, arguments

ROOT = Path(__file__).resolve().parents[2]

# fastgpt, of which the last process is killed before iteration 31, but only the first time.
KILLED_ONCE = """
import os, signal, sys
from fastgpt.__main__ import main
from fastgpt.training.trainer import Trainer

update = Trainer._update

def killed(self, learning_rate):
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and self.world.rank == self.world.size - 1 and self.iter_num == 31:
        os.kill(os.getpid(), signal.SIGKILL)
    return update(self, learning_rate)

Trainer._update = killed
sys.exit(main())
"""


def started(
    keys: dict[str, Any], *torchrun: str, processes: int = 1, program: Path | None = None
) -> "subprocess.Popen[str]":
    """`python -m fastgpt train`, with several processes by torchrun with these options, or with
    another program in place of fastgpt's."""
    command = [str(program)] if program else ["-m", "fastgpt"]
    if processes > 1:
        options = ["--standalone", f"--nproc_per_node={processes}", *torchrun]
        command = ["-m", "torch.distributed.run", *options, *command]
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, *command, "train", "--preset=gpt2", *arguments(keys)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(search)},
    )


def finished(process: "subprocess.Popen[str]", returncode: int = 0) -> str:
    output, _ = process.communicate(timeout=HANGS)
    assert process.returncode == returncode, output
    return output


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + HANGS
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.005)
