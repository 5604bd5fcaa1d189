"""Parts of ``gpu_report.py``: every op again and again, equal to the bit, which leaves
determinism.json in FOLDER; without one every op once, on small shapes, for compute-sanitizer.

    python bench/_ops/determinism.py FOLDER
    python bench/_ops/determinism.py
"""

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import (
    bench_attention,
    bench_embedding,
    bench_gelu,
    bench_layer_norm,
    bench_linear,
    bench_linear_cross_entropy,
    bench_mlp,
    bench_residual_layer_norm,
)
from bench._harness.cli import failure_of, write_json
from bench._harness.timing import synchronize
from bench._ops.op_bench import DEVICE, DTYPE, Draw, Op, gradients_like, tensors, wants_gradient

REPEATS = 250

# Ragged on purpose: one element more or less than tiles hold.
SMALL_SIZES = {
    "attention_qkvpacked": {"B": 2, "T": 161, "H": 2, "D": 64},
    "embedding": {"B": 2, "T": 33, "C": 96, "V": 65},
    "gelu": {"M": 33, "N": 200},
    "layer_norm": {"M": 37, "C": 200},
    "linear": {"M": 200, "K": 136, "N": 264},
    "linear_cross_entropy": {"M": 33, "C": 64, "V": 1003},
    "mlp": {"M": 200, "C": 72},
    "residual_layer_norm": {"M": 37, "C": 200},
}

FILES = (
    bench_attention,
    bench_embedding,
    bench_gelu,
    bench_layer_norm,
    bench_linear,
    bench_linear_cross_entropy,
    bench_mlp,
    bench_residual_layer_norm,
)
BENCHMARKS: dict[str, Op] = {file.OP.name: file.OP for file in FILES}


def _once(op: Op, sizes: dict[str, int]) -> Callable[[], list[Tensor]]:
    """Forward and backward of ours on the same random inputs; outputs and gradients."""
    torch.manual_seed(0)
    inputs = op.inputs(Draw(DEVICE, DTYPE), **sizes)
    function = op.function("fused")
    leaves = [x for x in inputs if wants_gradient(x)]
    out_grads = gradients_like(function(*inputs))

    def once() -> list[Tensor]:
        outputs = tensors(function(*inputs))
        return [*outputs, *torch.autograd.grad(outputs, leaves, out_grads)]

    return once


def determinism(
    folder: Path, repeats: int = REPEATS, sizes: dict[str, dict[str, int]] | None = None
) -> int:
    """Every op again and again, equal to the bit? First the size that GPT-2 trains with."""
    found: dict[str, Any] = {}
    for name, op in BENCHMARKS.items():
        start = time.monotonic()
        try:
            once = _once(op, dict(op.gpu_sizes[0]) if sizes is None else sizes[name])
            found[name] = {"repeats": repeats, "different": _different(once, repeats)}
        except Exception as error:  # whatever it is, the other ops are looked at all the same
            traceback.print_exc()
            found[name] = {"repeats": 0, "different": failure_of(error)}
        found[name]["seconds"] = round(time.monotonic() - start, 1)
        print(name, found[name])
        write_json(folder / "determinism.json", found)
    return int(any(one["different"] for one in found.values()))


def _different(once: Callable[[], list[Tensor]], repeats: int) -> int:
    """How often the results are not those of the first time."""
    first = once()
    return sum(
        not all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))
        for _ in range(repeats - 1)
    )


def small(sizes: dict[str, dict[str, int]] = SMALL_SIZES) -> int:
    """Every op once on small shapes, for compute-sanitizer to look at."""
    for name, op in BENCHMARKS.items():
        print(f"op: {name}", flush=True)
        for result in _once(op, sizes[name])():
            synchronize(result.device)
    return 0


if __name__ == "__main__":
    sys.exit(determinism(Path(sys.argv[1])) if len(sys.argv) > 1 else small())
