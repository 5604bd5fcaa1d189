"""The progress of a run on the terminal, and the signals that stop it."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import torch

from fastgpt._progress import PlainConsole
from fastgpt.devices import peak_flops
from fastgpt.language_model import LanguageModel
from fastgpt.model import A100_PEAK_FLOPS, GPT
from fastgpt.training.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def _bar(console: "Console") -> "Progress":
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("iteration"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class Meter:
    """The progress of a run: a bar on a terminal, one line per report elsewhere."""

    def __init__(
        self,
        config: TrainConfig,
        console: "Console | PlainConsole",
        first_iter: int,
        model: LanguageModel,
        n_gpus: int = 1,
    ) -> None:
        self._config = config
        self._console = console
        self._estimate_mfu = _estimate_of(model, n_gpus, console)
        self._bar: Progress | None = None
        if not isinstance(console, PlainConsole) and console.is_terminal:
            self._bar = _bar(console)
            self._task = self._bar.add_task(
                "train", total=config.max_iters, completed=first_iter, facts=""
            )
        self._since, self._from_iter = time.perf_counter(), first_iter
        self._warm = False  # the first report includes compilation
        self.mfu: float | None = None

    def __enter__(self) -> "Meter":
        if self._bar is not None:
            self._bar.start()
        self._since = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count as training."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def report(self, iteration: int, loss: float) -> float:
        """Show the loss of an iteration that just ended, and the speed since the last report,
        which is returned in tokens per second.
        """
        config = self._config
        now, done = time.perf_counter(), iteration + 1
        seconds = (now - self._since) / (done - self._from_iter)  # per iteration
        self._since, self._from_iter = now, done
        sequences = config.batch_size * config.gradient_accumulation_steps
        speed = sequences * config.block_size / seconds
        facts = f"loss {loss:.4f}, {speed:,.0f} tokens/s"
        if self._estimate_mfu is not None and self._warm:
            mfu = self._estimate_mfu(sequences, seconds)
            self.mfu = mfu if self.mfu is None else 0.9 * self.mfu + 0.1 * mfu
            facts += f", mfu {100 * self.mfu:.1f}%"
        self._warm = True
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, facts=facts)
        else:
            self._console.print(
                f"iter {iteration}: {facts}, {1000 * seconds:.1f} ms", highlight=False
            )
        return speed


def _estimate_of(
    model: LanguageModel, n_gpus: int, console: "Console | PlainConsole"
) -> Callable[[int, float], float] | None:
    """The MFU in [0, 1] of so many sequences in so many seconds; None without a known GPU."""
    device = next(model.parameters()).device
    if device.type != "cuda" or not isinstance(model, GPT):
        return None
    gpu = torch.cuda.get_device_name(device)
    peak = peak_flops(gpu)
    if peak is None:
        console.print(f"no mfu: the peak of {gpu} is not known")
        return None
    scale = A100_PEAK_FLOPS / peak  # of nanoGPT's figure
    # The figure is that of one GPU, which has a share of the sequences.
    return lambda sequences, seconds: scale * model.estimate_mfu(sequences // n_gpus, seconds)


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second one acts as usual.

    Signals reach the main thread only; in another thread the event stays unset.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        event.set()
        restore()

    for number in before:
        signal.signal(number, on_interrupt)
    try:
        yield event
    finally:
        restore()
