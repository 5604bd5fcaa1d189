"""Host time of a training step of GPT-2's 12 layers in eager mode, without a GPU.

    python bench/host_time.py

The kernels are compiled for sm_90 and launched by a stub on 16 by 16 tensors. This leaves the time
in Python, PyTorch's dispatcher and autograd, and Triton's launch up to the driver. For comparison,
the same model runs on PyTorch's own ops, which do execute. The result is the minimum over many
steps, in thread time, because other programs disturb.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from triton.compiler import compiler
from triton.runtime.driver import driver

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._compile.static import no_gpu_needed
from fastgpt import GPT, GPTConfig
from fastgpt._progress import progress_bar
from fastgpt.kernels import _host, fused, torch_ops

_CAPABILITY, _MULTIPROCESSORS = 90, 132
_SHARED_MEMORY = 232448
_LAYERS, _STEPS = 12, 200


@contextlib.contextmanager
def no_launches() -> Iterator[None]:
    """Context in which kernels are compiled and launched for CPU tensors, up to the driver call."""

    def launcher(source: Any, metadata: Any) -> Any:
        return lambda *arguments: None

    def loaded(*_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    with (
        no_gpu_needed(_CAPABILITY),
        mock.patch.object(driver.active, "launcher_cls", launcher, create=True),
        mock.patch.object(driver.active, "utils", SimpleNamespace(load_binary=loaded), create=True),
        mock.patch.object(compiler, "max_shared_mem", lambda device: _SHARED_MEMORY),
        _host.interpreted(True, _CAPABILITY, _MULTIPROCESSORS),
    ):
        yield


def step_ms(ops: ModuleType, n_layer: int = _LAYERS, steps: int = _STEPS) -> tuple[float, float]:
    """Milliseconds of a forward and of a backward pass."""
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=n_layer, n_head=1, n_embd=16)
    model = GPT(config, ops=ops)
    idx = torch.zeros(1, config.block_size, dtype=torch.int64)
    forward = backward = float("inf")
    with progress_bar(ops.__name__) as show:
        for i in range(3 + steps):
            start = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(idx, idx)[1]
            middle = time.thread_time()
            loss.backward()
            end = time.thread_time()
            model.zero_grad(set_to_none=True)
            if i >= 3:  # the first steps compile
                forward, backward = min(forward, middle - start), min(backward, end - middle)
            show((i + 1) / (3 + steps))
    return 1e3 * forward, 1e3 * backward


def main() -> None:
    torch.set_num_threads(1)
    table = Table("12 layers, bfloat16 autocast", "forward, ms", "backward, ms", "sum, ms")
    torch._C._set_mkldnn_enabled(False)  # its set-up of a product takes longer than everything else
    with no_launches():
        rows = {"fastgpt, kernels not run": step_ms(fused)}
    rows["PyTorch's ops, run"] = step_ms(torch_ops)
    for name, (forward, backward) in rows.items():
        table.add_row(name, f"{forward:.1f}", f"{backward:.1f}", f"{forward + backward:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
