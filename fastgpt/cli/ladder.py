"""``fastgpt ladder``: train every rung from a bigram table to GPT and compare them."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastgpt import ladder
from fastgpt._optional import optional
from fastgpt.cli.plot import LOSSES, check_picture, draw
from fastgpt.data import builtin_texts
from fastgpt.data.manifest import Manifest
from fastgpt.data.prepare import characters_of, prepare
from fastgpt.data.sources import source_of
from fastgpt.training.config import Limited


@dataclass(frozen=True, kw_only=True)
class LadderConfig(Limited):
    """Climb from a bigram table to GPT: train each rung on the same batches and compare.

    Takes about five minutes on one CPU core. The last rung, scaled, is the preset char. It is meant
    for a GPU, and skipped on a machine without one unless --rungs names it.
    """

    # Text to train on, by characters.
    input: Path | None = None
    # Rungs to train: bigram, average, head, heads, feed-forward, residual, layernorm, scaled.
    rungs: tuple[str, ...] = ()
    # Number of the last update of each rung; the first is 0.
    max_iters: int = 5000
    # PNG file for the learning curves.
    output: Path = Path("ladder.png")
    # Print a JSON object per rung: rung, parameters, train_loss, val_loss, tokens_per_second,
    # sample.
    json: bool = False
    # Seed for the weights and the batches.
    seed: int = 1337
    # cuda, cuda:N, cpu, mps, or auto (cuda if available, else cpu).
    device: str = "auto"


def run_ladder(config: LadderConfig, console: Console, progress: Console) -> None:
    """Print the result of each rung to ``console``; show the training on ``progress``. Finished
    rungs are printed and drawn even if a later one fails or is interrupted.

    Raises ValueError for an unknown rung, an output that does not end in .png, and a text too short
    for the rungs' block size; and the errors of reading the text and of ``Trainer``.
    """
    rungs = tuple(dict.fromkeys(config.rungs)) or _fitting(config.device)
    blocks = [ladder.keys_of(rung)["block_size"] for rung in rungs]
    check_picture(config.output)
    config.output.parent.mkdir(parents=True, exist_ok=True)  # before minutes of training
    results: list[ladder.Result] = []
    with tempfile.TemporaryDirectory(prefix="fastgpt-ladder-") as folder:
        data_dir = Path(folder) / "data"
        _check_length(_prepared(config.input, data_dir), max(blocks))
        keys = {name: getattr(config, name) for name in ("max_iters", "seed", "device")}
        runs = ladder.climb(
            rungs, data_dir, Path(folder), progress, lr_decay_iters=config.max_iters, **keys
        )
        try:
            for result in runs:
                results.append(result)
                if config.json:
                    fields = {k: v for k, v in asdict(result).items() if k != "rows"}
                    console.out(json.dumps(fields))
        finally:
            if results:
                _show(results, config, console, progress)


def _fitting(device: str) -> tuple[str, ...]:
    """The default rungs: all on a GPU, all but the last elsewhere."""
    on_gpu = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    return tuple(ladder.RUNGS) if on_gpu else tuple(ladder.RUNGS)[:-1]


def _prepared(path: Path | None, data_dir: Path) -> Manifest:
    if path is None:
        return builtin_texts.prepare_builtin(data_dir)
    source = source_of(path)
    return prepare(source, characters_of(source), data_dir)


def _check_length(manifest: Manifest, block_size: int) -> None:
    for name, split in manifest.splits.items():
        if split.tokens <= block_size:
            raise ValueError(
                f"input must have more than {block_size} characters (the block size) in each "
                f"split, got {split.tokens} in {name}"
            )


def _show(
    results: Sequence[ladder.Result], config: LadderConfig, console: Console, progress: Console
) -> None:
    if not config.json:
        console.print(_table(results))
    try:
        optional("matplotlib", "the picture", "log")
    except ImportError as error:
        progress.print(f"no picture: {error}")
        return
    # The losses before training are so large that they would hide the differences.
    trained = {r.rung: [row for row in r.rows if row["iter"]] for r in results}
    draw(trained, LOSSES).savefig(config.output, dpi=150)
    progress.print(f"wrote {config.output}")


def _table(results: Sequence[ladder.Result]) -> Table:
    table = Table(title="Loss in nats per token, lower is better", box=box.SIMPLE)
    table.add_column("rung", no_wrap=True)
    for header in ("parameters", "train", "validation", "tokens/s"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("sample")  # shortened on a narrow terminal
    for result in results:
        table.add_row(
            result.rung,
            f"{result.parameters:,}",
            f"{result.train_loss:.3f}",
            f"{result.val_loss:.3f}",
            f"{result.tokens_per_second:,.0f}",
            Text(" / ".join(result.sample.split("\n")), no_wrap=True, overflow="ellipsis"),
        )
    return table
