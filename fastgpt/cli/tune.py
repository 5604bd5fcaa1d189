"""``fastgpt tune``: find the fastest kernel configurations on this GPU."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastgpt._progress import progress_bar
from fastgpt.devices import resolve_device, resolve_dtype, triton_refusal
from fastgpt.language_model import GPTConfig
from fastgpt.model import PRETRAINED_SHAPES
from fastgpt.training.config import COUNT_OR_0, Dtype, check_limits
from fastgpt.training.presets import PRESETS

if TYPE_CHECKING:  # it needs Triton
    from fastgpt import tuning


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Find the fastest kernel configurations on this GPU for training one model.

    The result is stored in $FASTGPT_TUNED, by default ~/.cache/fastgpt/tuned, and used from then
    on. If stopped, the same command continues where it was.
    """

    # A size of GPT-2, or the 10.6M parameters of the preset char.
    model: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "char"] = "gpt2"
    # Sequences per batch.
    batch_size: int = 32
    # Tokens per sequence; 0: 1024, or 256 for char.
    block_size: int = 0
    # Dropout probability.
    dropout: float = 0.0
    # Use biases in Linear and LayerNorm layers.
    bias: bool = False
    # Recompute GELU and LayerNorm in the backward pass.
    recompute: bool = False
    # Restrict attention to each token's own document.
    document_mask: bool = False
    # auto: bfloat16 on a GPU that supports it, else float16. float32 is not tuned.
    dtype: Dtype = "auto"
    # cuda or cuda:N.
    device: str = "cuda"
    # Do not start to tune another launch after this many seconds.
    seconds: float = 180.0
    # Measure nothing: print earlier results as lines for kernels/shipped_table.py.
    export: bool = False

    def __post_init__(self) -> None:
        check_limits(self, block_size=COUNT_OR_0)


def shape_of(config: TuneConfig) -> GPTConfig:
    """The shape of the model to tune for."""
    options: dict[str, Any] = dict(dropout=config.dropout, bias=config.bias)
    if config.model == "char":
        keys = PRESETS["char"]
        options |= {name: keys[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}
        options["vocab_size"] = 65
    else:
        shape = PRETRAINED_SHAPES[config.model]
        options |= dict(zip(("n_layer", "n_head", "n_embd"), shape, strict=True))
    if config.block_size:
        options["block_size"] = config.block_size
    return GPTConfig(**options)


def run_tune(config: TuneConfig, console: Console) -> int:
    """Tune or export. Returns the exit code, 1 if a candidate made the GPU fail.

    Raises ValueError for a device without the Triton kernels, for float32, and if there is nothing
    to export; OSError if the table cannot be written.
    """
    device = _gpu(config)
    from fastgpt import tuning  # needs Triton

    if config.export:
        table = tuning.Table.read(device)
        if not table.lines:
            raise ValueError("export must be False before anything was measured here, got True")
        console.print(
            "\n".join(tuning.exported(table)) or "no entry differs from the shipped table"
        )
        return 0
    dtype = resolve_dtype(config.dtype, device)
    if dtype.itemsize != 2:
        raise ValueError(f"dtype must be auto, bfloat16 or float16, got {config.dtype!r}")
    shape = shape_of(config)
    work = tuning.Workload(shape, config.batch_size, dtype, config.recompute, config.document_mask)
    left_out: list[str] = []
    try:
        with progress_bar("tuning") as progress:
            table, left = tuning.tune(
                work, device, seconds=config.seconds, show=left_out.append, progress=progress
            )
    except RuntimeError as error:
        console.print("\n".join([*left_out, f"error: {error}"]))
        return 1
    for line in left_out:
        console.print(line)
    console.print(_shown(table))
    console.print(tuning.summary(table, left))
    return 0


def _gpu(config: TuneConfig) -> torch.device:
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be a GPU, got {config.device}: this machine has none")
    device = resolve_device(config.device)
    refusal = triton_refusal(device) if device.type == "cuda" else "it has no Triton kernels"
    if refusal:
        raise ValueError(f"device must be a GPU for the Triton kernels, got {device}: {refusal}")
    return device


def _shown(table: "tuning.Table") -> Table:
    from fastgpt.tuning.table import name_of

    out = Table(
        title="Launches, and milliseconds of a training step's passes that use them", box=box.SIMPLE
    )
    out.add_column("launch", no_wrap=True)
    for header in ("before", "now", "gain"):
        out.add_column(header, justify="right", no_wrap=True)
    out.add_column("configuration")
    changes = table.changes()
    for line in table.lines.values():
        out.add_row(
            name_of(line.key),
            f"{line.present_ms:.3f}",
            f"{line.ms:.3f}",
            f"{line.gain:.3f}x",
            _short(line.config) if line in changes else f"unchanged, of {line.n_tried} tried",
        )
    return out


def _short(config: Any) -> str:
    if not isinstance(config, tuple):
        return str(config)
    values = list(config)
    while values and values[-1] is None:
        values.pop()
    return f"{type(config).__name__}({', '.join(map(str, values))})"
