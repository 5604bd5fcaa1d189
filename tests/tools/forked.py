"""Processes forked from one that has already imported the project, which takes seconds.

A test that needs its own process, for signals, limits or several ranks, does not pay for the
imports.
"""

import functools
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import connection, context, forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from tests.tools.small_runs import HANGS

ROOT = Path(__file__).resolve().parents[2]
# The last two are imported by the first update and by a sharded checkpoint.
_IMPORTED = ["pytest", "tests.tools.small_runs", "fastgpt.cli.train", "fastgpt.training.fsdp"]
_IMPORTED += ["torch._dynamo", "torch.distributed.checkpoint"]


@functools.cache
def _server() -> context.ForkServerContext:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_IMPORTED)
    search = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=search):
        forkserver.ensure_running()
    return server


def _child(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    folder: str,
    environment: dict[str, str],
    output: connection.Connection,
) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output.fileno(), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))
    output.close()
    sys.exit(function(*args))


class Forked:
    """Runs ``function(*args)`` in ``processes`` processes, with torchrun's environment variables.
    Its result is the exit status; all output goes into one pipe.
    """

    def __init__(self, function: Callable[..., Any], *args: Any, processes: int = 1) -> None:
        reader, writer = _server().Pipe(duplex=False)
        self._output, self._processes = reader, []
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in range(processes):
            world = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_PORT=port)
            environment = {**os.environ, "MASTER_ADDR": "localhost"}
            environment |= {name: str(value) for name, value in world.items()}
            given = (function, args, os.getcwd(), environment, writer)
            self._processes.append(_server().Process(target=_child, args=given))
            self._processes[-1].start()
        writer.close()

    def send_signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def finished(self, *returncodes: int) -> str:
        """Wait for the end; return the output. ``returncodes``: the expected ones, by default 0."""
        parts: list[bytes] = []
        while connection.wait([self._output], HANGS):
            parts.append(os.read(self._output.fileno(), 2**16))
            if not parts[-1]:
                break
        else:
            self.kill()
        output = b"".join(parts).decode()
        for process in self._processes:
            process.join(HANGS)
        codes = [process.exitcode for process in self._processes]
        self.kill()  # those that closed their output and hang
        assert set(codes) == set(returncodes or (0,)), (codes, output)
        return output

    def kill(self) -> None:
        for process in self._processes:
            process.kill()

    def wait_for(self, path: Path) -> None:
        """Wait until the file exists."""
        deadline = time.monotonic() + HANGS
        while not path.exists():
            alive = all(process.is_alive() for process in self._processes)
            if not alive or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no {path}: {self.finished(-signal.SIGKILL)}")
            time.sleep(0.005)
