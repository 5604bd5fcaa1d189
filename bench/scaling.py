"""Predicts tokens per second on many GPUs, without measuring.

    python bench/scaling.py                               # GPT-2 124M, 1 to 1024 H200s
    python bench/scaling.py --model=gpt2-xl --batch_size=8 --gradient_accumulation_steps=4

The computation is the roofline's step on one GPU (``roofline.py``) plus the bytes of AdamW. The
time of a collective is its bytes over the bandwidth of a ring (Patarasuk & Yuan 2009) plus the
latency of its steps. With a full model on each GPU (``--parallel=ddp``), all gradients are reduced
after the backward. How much of FSDP2's communication overlaps with computation is not predicted:
each row shows both limits, no overlap and full overlap. Each GPU has its own batch. Efficiency is
tokens per second relative to that many single GPUs; with FSDP2 it can exceed 100%, since each GPU
updates only its shard.

``tests/bench/test_scaling.py`` compares the bytes of each kind of collective with a real run of two
processes.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import roofline
from bench._harness import cli
from fastgpt import GPT, GPTConfig
from fastgpt.training.optimizer import flat_size

# NVLink bandwidth of a GPU in one direction, GB/s: half of the value in NVIDIA's data sheets for
# NVLink 3, 4 and 5.
NVLINK_GB_PER_S = {"a100": 300.0, "h100": 450.0, "h200": 450.0, "b200": 900.0}
# Achievable shares of the bandwidth: 370 of 450 GB/s over NVLink (NVIDIA/nccl-tests issue 212), and
# 46 to 48 of 50 GB/s over InfiniBand (issue 290).
_NVLINK_SHARE, _NETWORK_SHARE = 370 / 450, 47 / 50

# Latency in µs, base and per step over NVLink and over the network, for a ring and a tree: from
# NCCL's own model of its LL128 protocol (src/graph/tuning.cc, v2.28).
_START_US = 14.0
_RING_US, _TREE_US = (1.9, 4.0), (1.25, 8.5)

# Bytes per parameter: the norm reads the gradient, clipping scales it, AdamW reads and updates all.
_UPDATE_BYTES = 4 + 8 + 28

Parallel = Literal["ddp", "fsdp"]
Collective = tuple[Literal["all-reduce", "all-gather", "reduce-scatter"], int]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Predicted speed and efficiency of training GPT on many GPUs. Needs no GPU."""

    # Numbers of GPUs: up to one node, or whole nodes.
    gpus: tuple[int, ...] = tuple(2**power for power in range(11))
    # Model size: layers, heads and width.
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    # Sequences per GPU and batch.
    batch_size: int = 32
    # Batches per GPU and step.
    gradient_accumulation_steps: int = 1
    # GPU whose ceilings and NVLink are used. Ceilings: h200 measured, the others from data sheets.
    device: Literal["a100", "h100", "h200", "b200"] = "h200"
    # Network bandwidth per GPU to other nodes, Gb/s.
    network: float = 400.0
    # GPUs connected by NVLink.
    gpus_per_node: int = 8

    def __post_init__(self) -> None:
        node = self.gpus_per_node
        wrong = [gpus for gpus in self.gpus if gpus > node and gpus % node]
        if wrong or not self.gpus:
            raise ValueError(
                f"gpus must be one or more numbers from 1 to gpus_per_node ({node}) or multiples "
                f"of it, got {' '.join(map(str, wrong)) or 'none'}"
            )

    @property
    def step(self) -> roofline.Options:
        return roofline.Options(model=self.model, batch_size=self.batch_size, device=self.device)


def parameters_of(config: GPTConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(GPT(config).named_parameters())


def collectives(
    parameters: dict[str, Tensor], parallel: Parallel, gpus: int, micro_batches: int = 1
) -> list[Collective]:
    """The collectives of one update: kind and bytes of the whole tensor, which is the output of an
    all-gather and the input of a reduce-scatter. Gradients are sent in float32, FSDP2's parameters
    in bfloat16 except LayerNorm's in float32 (see ``fastgpt.training.fsdp.shard``)."""
    found: list[Collective] = [("all-reduce", 8), ("all-reduce", 4)]  # valid targets, the loss
    if parallel == "ddp":  # two flat buffers: with weight decay, and without
        decayed = [p for p in parameters.values() if p.dim() >= 2]
        others = [p for p in parameters.values() if p.dim() < 2]
        return found + [("all-reduce", 4 * flat_size(group)) for group in (decayed, others)]
    groups: dict[str, list[Tensor]] = {}
    for name, p in parameters.items():
        block = re.search(r"\.h\.\d+\.", name)
        group = "norms" if "ln_" in name else block[0] if block else "tables"
        groups.setdefault(group, []).append(p)
    for group, members in groups.items():
        numel = sum(_padded_numel(p, gpus) for p in members)
        itemsize = 4 if group == "norms" else 2
        # A block's weights are freed after the forward and gathered again for the backward.
        gathers = micro_batches * (2 if group.startswith(".h.") else 1)
        found.extend(("all-gather", itemsize * numel) for _ in range(gathers))
        found.append(("reduce-scatter", 4 * numel))
    return [*found, ("all-reduce", 4 * len(parameters))]  # squared norms of the gradients


def _padded_numel(p: Tensor, gpus: int) -> int:
    """FSDP2 pads each parameter to the same number of rows on every GPU."""
    rows = p.shape[0]
    return -(-rows // gpus) * gpus * (p.numel() // rows)


def sent_bytes(sent: list[Collective], gpus: int) -> float:
    """Bytes that each GPU sends in rings; an all-reduce is a reduce-scatter and an all-gather."""
    return sum((1 + (kind == "all-reduce")) * n for kind, n in sent) * (gpus - 1) / gpus


def communication_ms(sent: list[Collective], gpus: int, options: Options) -> float:
    """Time of all collectives, one after another. Between nodes, the ring uses all adapters of a
    node. An all-reduce has the latency of a tree, whose depth grows with the logarithm."""
    if gpus == 1:
        return 0.0
    o, nodes = options, -(-gpus // options.gpus_per_node)
    gb_per_s = _NVLINK_SHARE * NVLINK_GB_PER_S[o.device]
    if nodes > 1:
        gb_per_s = min(gb_per_s, _NETWORK_SHARE * o.network / 8 * o.gpus_per_node)
    ring = (gpus - nodes) * _RING_US[0] + (nodes - 1) * _RING_US[1]
    tree = 2 * ((gpus // nodes - 1) * _TREE_US[0] + math.log2(nodes) * _TREE_US[1])
    latency = sum(_START_US + (tree if kind == "all-reduce" else ring) for kind, _ in sent)
    return sent_bytes(sent, gpus) / gb_per_s / 1e6 + latency / 1e3


def table(options: Options, parallel: Parallel, micro_batch_ms: float) -> Table:
    """One row per number of GPUs; ``micro_batch_ms``: forward and backward on one GPU."""
    o, config, ceilings = options, options.step.config, options.step.ceilings
    parameters = parameters_of(config)
    numel = sum(p.numel() for p in parameters.values())
    title = (
        f"{'DDP' if parallel == 'ddp' else 'FSDP2'}, predicted, not measured: {o.model}, "
        f"B={o.batch_size} x {o.gradient_accumulation_steps} a GPU, T={config.block_size},\n"
        f"{ceilings.name}, {o.network:g} Gb/s a GPU between nodes of {o.gpus_per_node}"
    )
    headers = "GPUs\n", "sent\nGB a GPU", "communi-\ncation ms", "compu-\ntation ms"
    overlap = "" if parallel == "ddp" else "no .. full overlap"
    results = f"million tokens/s,\n{overlap}", "efficiency\n"
    out = cli.plain_table(title, (), (*headers, *results))

    def computed_ms(updated: int) -> float:
        update = ceilings.ms(0, _UPDATE_BYTES * updated, half=True)
        return o.gradient_accumulation_steps * micro_batch_ms + update

    for gpus in sorted(o.gpus):
        sent = collectives(parameters, parallel, gpus, o.gradient_accumulation_steps)
        communication = communication_ms(sent, gpus, o)
        computation = computed_ms(numel if parallel == "ddp" else -(-numel // gpus))
        steps_ms = [computation + communication]
        if parallel == "fsdp":
            steps_ms.append(max(computation, communication))
        tokens = gpus * o.batch_size * config.block_size * o.gradient_accumulation_steps
        speeds = [f"{tokens / ms / 1e3:.3f}" for ms in steps_ms]
        shares = [f"{computed_ms(numel) / ms:.1%}" for ms in steps_ms]
        gigabytes = f"{sent_bytes(sent, gpus) / 1e9:.3f}"
        times = f"{communication:.2f}", f"{computation:.2f}"
        out.add_row(str(gpus), gigabytes, *times, " .. ".join(speeds), " .. ".join(shares))
    return out


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for a wrong argument."""
    try:
        o = cli.options(Options(), argv)
    except ValueError as error:
        return cli.failed(error)
    one = roofline.measure("fastgpt", o.step.config, o.batch_size, ceilings=o.step.ceilings)
    console = Console(highlight=False)
    console.print(table(o, "ddp", one.ms), table(o, "fsdp", one.ms))
    return 0


if __name__ == "__main__":
    sys.exit(main())
