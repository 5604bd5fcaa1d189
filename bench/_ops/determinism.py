"""Parts of ``gpu_report.py``. With OUT: checks that repeated ops are bitwise equal and writes
OUT/determinism.json. Without: runs every op once on small shapes, for compute-sanitizer.

    python -m bench._ops.determinism OUT
    python -m bench._ops.determinism
"""

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench._harness import cli
from bench._ops.op_bench import (
    DEVICE,
    Op,
    RandomTensors,
    every_op,
    left_to_torch,
)
from fastgpt.timing import synchronize
from fastgpt.tuning.phase import gradients_like, results
from fastgpt.tuning.workload import tensors_in

REPEATS = 250

Cases = list[tuple[Op, dict[str, int]]]


def small_cases() -> Cases:
    ours = [op for op in every_op() if not left_to_torch(op)]
    return [(op, op.small) for op in ours if op.small is not None]


def _forward_and_backward(op: Op, sizes: dict[str, int]) -> Callable[[], list[Tensor]]:
    """Outputs and gradients of our op, of the same random inputs at every call."""
    torch.manual_seed(0)
    inputs = op.inputs(RandomTensors(DEVICE, op.dtype), **sizes)
    function = op.function("fused")
    out_grads = gradients_like(tensors_in(function(*inputs)))
    return lambda: results(function, inputs, {}, None, out_grads)


def determinism(
    folder: Path,
    repeats: int = REPEATS,
    cases: Cases | None = None,
) -> int:
    """Repeat every op, by default at the size that GPT-2 trains with; 1 if any differs or fails."""
    found: dict[str, Any] = {}
    for op, sizes in cases or [(op, dict(op.gpu_sizes[0])) for op, _ in small_cases()]:
        start = time.monotonic()
        try:
            run = _forward_and_backward(op, sizes)
            found[op.name] = {"repeats": repeats, "different": _different(run, repeats)}
        except Exception as error:  # whatever it is, the other ops are still run
            traceback.print_exc()
            found[op.name] = {"repeats": 0, "different": cli.failure_of(error)}
        found[op.name]["seconds"] = round(time.monotonic() - start, 1)
        print(op.name, found[op.name])
        cli.write_json(folder / "determinism.json", found)
    return int(any(one["different"] for one in found.values()))


def _different(run: Callable[[], list[Tensor]], repeats: int) -> int:
    """How many results differ from the first."""
    first = run()
    return sum(
        not all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
        for _ in range(repeats - 1)
    )


def small(cases: Cases | None = None) -> int:
    """Every op once on small shapes."""
    for op, sizes in cases or small_cases():
        print(f"op: {op.name}", flush=True)
        for result in _forward_and_backward(op, sizes)():
            synchronize(result.device)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where an op differs or fails, or 2 for a wrong argument."""
    parser = cli.Parser(description="Whether repeating an op gives the same bits.")
    parser.add_argument("out", nargs="?", type=Path, help="folder for determinism.json")
    out = parser.parse_args(argv).out
    try:
        return small() if out is None else determinism(cli.made_folder(out))
    except OSError as error:
        return cli.failed(error)


if __name__ == "__main__":
    sys.exit(main())
