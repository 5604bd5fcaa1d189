"""Tokens per second on many GPUs, before anybody has them: predicted, not measured.

    python bench/scaling.py                               # GPT-2 124M, 1 to 1024 H200s
    python bench/scaling.py --model=gpt2-xl --batch_size=8 --gradient_accumulation_steps=4
    python bench/scaling.py --parallel fsdp --gpus 8 64 512 --network=200 --out=bench/out/mine

The computation is the roofline's (``roofline.py``): a real step takes longer, so that more of the
communication hides behind it. The communication is NCCL's model of itself on NVLink and a network
(``_scaling_links.py``: where the bandwidths and latencies come from), and what of it hides follows
from the order in which PyTorch issues it (``_scaling_step.py``). Each GPU has a batch of its own:
more GPUs, more tokens a step. Efficiency is tokens per second over those of as many single GPUs
without DDP or FSDP2; FSDP2's can pass 100%, since each GPU updates its share of the parameters.

``tests/test_scaling_processes.py`` runs two processes and holds every collective of theirs, in
order and to the byte, against these predictions.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import _command
import _scaling_report
import roofline
import torch
from _scaling_links import NVLINK_GB_PER_S, Cluster
from _scaling_step import Step, ddp, fsdp
from _scaling_timeline import timeline

from fastgpt import GPTConfig


@dataclass(frozen=True, kw_only=True)
class Options:
    """Predicted tokens per second and efficiency of training GPT on many GPUs, from the roofline of
    a step, the bytes of its collectives and the links that carry them. Needs no GPU.
    """

    # Ways of going parallel, side by side.
    parallel: tuple[Literal["ddp", "fsdp"], ...] = ("ddp", "fsdp")
    # Numbers of GPUs: up to a node, or whole nodes.
    gpus: tuple[int, ...] = tuple(2**power for power in range(11))
    # Layers, heads and width.
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    # Sequences per batch of each GPU.
    batch_size: int = 32
    # Batches of each GPU in a step.
    gradient_accumulation_steps: int = 1
    # Tokens per sequence.
    block_size: int = GPTConfig.block_size
    # Rows of the embedding and of the head.
    vocab_size: int = GPTConfig.vocab_size
    # Biases in Linear and LayerNorm.
    bias: bool = True
    # GELU and LayerNorm are computed again in the backward.
    recompute: bool = False
    # Gradients on the wire, and with DDP the parameters. FSDP2 gathers bfloat16 ones always.
    gradients: Literal["float32", "bfloat16"] = "float32"
    # Whose ceilings: a100 and so on are data sheets, h200 was measured.
    device: Literal["a100", "h100", "h200", "b200"] = "h200"
    # TFLOP/s of 16-bit products, instead of the device's.
    tflops: float | None = None
    # TB/s of device memory, read plus written, instead of the device's.
    tbps: float | None = None
    # GB/s that a GPU can send over NVLink, instead of the device's data sheet.
    nvlink: float | None = None
    # Gb/s that a GPU can send to other nodes.
    network: float = 400.0
    # GPUs that NVLink joins.
    gpus_per_node: int = 8
    # Folder for scaling.json and scaling.png, which must not be there yet. Default: neither.
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("parallel", "gpus"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                given = " ".join(map(str, values)) or "none"
                raise ValueError(f"{name} must be one or more, each once, got {given}")
        for name in ("batch_size", "gradient_accumulation_steps", "block_size", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("nvlink", "network"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {rate}")
        for number in self.gpus:
            self.cluster.nodes(number)
        _ = self.one_gpu.ceilings

    @property
    def one_gpu(self) -> roofline.Options:
        return roofline.Options(
            model=self.model,
            batch_size=self.batch_size,
            block_size=self.block_size,
            vocab_size=self.vocab_size,
            bias=self.bias,
            device=self.device,
            tflops=self.tflops,
            tbps=self.tbps,
        )

    @property
    def cluster(self) -> Cluster:
        nvlink = NVLINK_GB_PER_S[self.device] if self.nvlink is None else self.nvlink
        return Cluster(nvlink, self.network / 8, self.gpus_per_node)


def predict(options: Options, parallel: str) -> dict[int, Step]:
    """A step on every number of ``options.gpus``, and on one GPU."""
    o, ceilings = options, options.one_gpu.ceilings
    params = "bfloat16" if parallel == "fsdp" else o.gradients
    one = timeline(o.one_gpu.config, o.batch_size, params, ceilings, o.recompute)
    step: Callable[..., Step] = ddp
    if parallel == "fsdp":
        step = partial(fsdp, reduce_itemsize=getattr(torch, o.gradients).itemsize)
    return {
        gpus: step(one, o.cluster, ceilings, gpus, o.gradient_accumulation_steps)
        for gpus in (1, *o.gpus)
    }


def record(options: Options) -> dict[str, Any]:
    """All that the tables and the chart are made from."""
    o = options
    return {
        "options": {key: value for key, value in asdict(o).items() if key != "out"},
        "torch": torch.__version__,
        "ceilings": asdict(o.one_gpu.ceilings),
        "cluster": asdict(o.cluster),
        "parallel": {name: _rows(o, predict(o, name)) for name in o.parallel},
    }


def _rows(options: Options, steps: dict[int, Step]) -> list[dict[str, Any]]:
    batch = options.batch_size * options.block_size * options.gradient_accumulation_steps
    return [
        {
            "gpus": gpus,
            "nodes": options.cluster.nodes(gpus),
            "ms": steps[gpus].ms,
            "exposed_ms": steps[gpus].exposed_ms,
            "communication_ms": steps[gpus].communication_ms,
            "collectives": len(steps[gpus].collectives),
            "sent_bytes": steps[gpus].sent_bytes,
            "tokens": gpus * batch,
            "tokens_per_s": gpus * batch / steps[gpus].ms * 1e3,
            "efficiency": steps[1].ms / steps[gpus].ms,
        }
        for gpus in sorted(options.gpus)
    ]


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for a wrong argument."""

    def planned() -> Options:
        return _command.options(Options(), argv)

    return _command.prediction("scaling", planned, record, _scaling_report)


if __name__ == "__main__":
    sys.exit(main())
