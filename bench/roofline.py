"""The minimal cost of a training step, predicted without a GPU and without allocating tensors.

    python bench/roofline.py                                   # GPT-2 124M, B=64, an H200
    python bench/roofline.py --variant sdpa fastgpt --model=gpt2-xl --batch_size=8 --device=b200
    python bench/roofline.py --tflops=700 --tbps=3 --out=bench/out/mine

Forward and backward of each variant run on fake tensors, and every operator that PyTorch dispatches
is counted:

- Calls: of operators that launch kernels; views, allocations and queries do not count. One of ours
  counts once, no matter how many kernels it launches.
- Bytes: inputs and outputs, each storage once. (For PyTorch's ``nll_loss``, which reads one logit
  per row, that is too much: 6 of the 129 ms of ``sdpa``.) Operators with a formula in
  ``kernels/costs.py`` are counted kernel by kernel, including intermediates in memory.
- FLOPs: of matrix products only, 2 M N K, as in ``torch.utils.flop_counter``; causal attention
  counts half. A product that a kernel recomputes counts twice.
- Time: for each kernel the larger of bytes / bandwidth and FLOPs / rate, one kernel after another.
  Launches are free, so a real step takes longer, especially at a small batch.
- Saved: the distinct storages that autograd holds after the forward, without the parameters, but
  with their 16-bit casts.
- The floor: a step in which every kernel moves each byte once (``_roofline/ceilings.py``).

The tensors pretend to be on the CPU, because autograd on fake CUDA tensors needs CUDA. PyTorch's
operators are the same there, except for the names of the attention kernels and for casts that only
CUDA's autocast makes, which ``_step/baselines.py`` makes explicitly.
"""

import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from torch import Tensor

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._harness import cli
from bench._roofline import roofline_report
from bench._roofline.ceilings import DEVICES, Ceilings, floor
from bench._roofline.counting import Report, count, fake_tensors
from bench._step.variants import VARIANTS
from fastgpt import GPT, GPTConfig
from fastgpt.kernels import fused
from fastgpt.model import PRETRAINED_SHAPES

VariantName = Literal["naive", "sdpa", "fastgpt", "fastgpt_recompute"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Operators, bytes, FLOPs, predicted time and saved activations of one forward and backward of
    GPT. Needs no GPU."""

    # Variants to compare.
    variant: tuple[VariantName, ...] = ("naive", "sdpa", "fastgpt", "fastgpt_recompute")
    # Model size: layers, heads and width.
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] = "gpt2"
    # Sequences per batch.
    batch_size: int = 64
    # Tokens per sequence.
    block_size: int = GPTConfig.block_size
    # Rows of the embedding and the head.
    vocab_size: int = GPTConfig.vocab_size
    # Dtype of the products, set by autocast unless the parameters already have it.
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    # Dtype of the parameters and their gradients.
    params: Literal["float32", "bfloat16", "float16"] = "float32"
    # GPU whose ceilings are used: measured for h200, from data sheets for the others.
    device: Literal["a100", "h100", "h200", "b200"] = "h200"
    # TFLOP/s of 16-bit products, instead of the device's.
    tflops: float | None = None
    # TB/s, read plus written, instead of the device's.
    tbps: float | None = None
    # Folder for roofline.json and roofline.png, which must not exist yet. Default: write no files.
    out: Path | None = None

    def __post_init__(self) -> None:
        if not self.variant or len(set(self.variant)) < len(self.variant):
            raise ValueError(
                f"variant must be one or more of {', '.join(get_args(VariantName))}, each once, "
                f"got {' '.join(self.variant) or 'none'}"
            )

    @property
    def config(self) -> GPTConfig:
        n_layer, n_head, n_embd = PRETRAINED_SHAPES[self.model]
        return GPTConfig(self.block_size, self.vocab_size, n_layer, n_head, n_embd)

    @property
    def ceilings(self) -> Ceilings:
        found = DEVICES[self.device]
        if self.tflops is None and self.tbps is None:
            return found
        tflops = found.tflops if self.tflops is None else self.tflops
        tb_per_s = found.tb_per_s if self.tbps is None else self.tbps
        return replace(found, name="given ceilings", tflops=tflops, tb_per_s=tb_per_s)


def measure(
    variant: str,
    config: GPTConfig,
    batch_size: int,
    *,
    dtype: str = "bfloat16",
    params: str = "float32",
    ceilings: Ceilings = DEVICES["h200"],
) -> Report:
    """The cost of one forward and backward of ``variant`` on (batch_size, block_size) tokens;
    ``dtype`` and ``params`` as in ``Options``. Raises ValueError for an invalid argument."""
    _check(config, batch_size, dtype, params)
    chosen = VARIANTS[variant]
    with fake_tensors():
        with torch.device("meta"):
            gpt = GPT(config, ops=fused, recompute=chosen.recompute)
        weights = {
            name: torch.empty_like(weight, device="cpu", dtype=getattr(torch, params))
            for name, weight in gpt.state_dict().items()
        }
        gpt.load_state_dict(weights, assign=True)
        idx = torch.empty(batch_size, config.block_size, dtype=torch.int64)
        targets = torch.empty_like(idx)

        def forward() -> Tensor:
            with nullcontext() if dtype == params else torch.autocast("cpu", getattr(torch, dtype)):
                return chosen.loss(gpt, idx, targets)

        parameters = list(gpt.parameters())
        return count(chosen.label, forward, parameters, ceilings)


def _check(config: GPTConfig, batch_size: int, dtype: str, params: str) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if config.dropout:
        raise ValueError(f"dropout must be 0: the CPU's SDPA has none, got {config.dropout}")
    if params not in ("float32", dtype):
        raise ValueError(f"params must be float32 or the dtype ({dtype}), got {params!r}")


def record(o: Options) -> dict[str, Any]:
    """The record from which the table and the chart are made."""
    itemsize, params_itemsize = (getattr(torch, name).itemsize for name in (o.dtype, o.params))
    rows = floor(o.config, o.batch_size, o.ceilings, itemsize, params_itemsize)
    return {
        "options": {key: value for key, value in asdict(o).items() if key != "out"},
        "torch": torch.__version__,
        "ceilings": asdict(o.ceilings),
        "floor": {"ms": sum(row.ms for row in rows), "rows": [asdict(row) for row in rows]},
        "variants": {
            name: asdict(
                measure(
                    name,
                    o.config,
                    o.batch_size,
                    dtype=o.dtype,
                    params=o.params,
                    ceilings=o.ceilings,
                )
            )
            for name in o.variant
        },
    }


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, or 2 for a wrong argument."""
    try:
        o = cli.options(Options(), argv)
        _check(o.config, o.batch_size, o.dtype, o.params)
        _ = o.ceilings
        if o.out is not None:
            cli.results_folder(o.out, "roofline")
    except cli.USER_ERRORS as error:
        return cli.failed(error)
    console, run = Console(highlight=False), record(o)
    console.print(roofline_report.table(run))
    if o.out is not None:
        cli.write_results(o.out, "roofline", run, roofline_report.chart, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
