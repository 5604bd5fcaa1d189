"""The base class of all training runs: the loop, output folder, log, optimizer, checkpoints, and
stopping by a signal.
"""

import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt._files import check_folder, exclusive_lock
from fastgpt._progress import AnyConsole, progress_bar, run_console
from fastgpt.devices import (
    autocast,
    random_states,
    resolve_device,
    resolve_dtype,
    set_random_states,
)
from fastgpt.language_model import Trainable
from fastgpt.tokenizer import Tokenizer, packed
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder
from fastgpt.training.config import TrainConfig
from fastgpt.training.distributed import ALONE, World, is_of_collective
from fastgpt.training.log import LOG, RunLog
from fastgpt.training.optimizer import MasterAdamW, saved_state
from fastgpt.training.step import Step

Figures = dict[str, float]


class Run:
    """The base class of a run. A subclass builds its model and then calls ``_build_optimizer``,
    ``_build_step`` and, to resume from a checkpoint, ``_restore``. It defines ``learning_rate``,
    ``_update``, ``evaluate`` and ``_save``.

    ``config`` has the keys ``out_dir``, ``device``, ``dtype``, ``seed``, ``grad_clip``,
    ``max_iters``, ``eval_interval`` and ``log_interval``.

    Raises ValueError or ImportError naming a key, NotADirectoryError if ``out_dir`` is a file.
    """

    model: Any
    loss: Any  # the module that Step calls
    optimizer: torch.optim.Optimizer
    NEWEST = ckpt.BEST  # file of the newest state, for runs that write no ``iter-*``
    FILES: tuple[str, ...] = (LOG,)  # moved away by a new run, as are old checkpoints
    _how_to_resume = "with the same command and --resume"

    def __init__(
        self,
        config: Any,
        console: "AnyConsole | None" = None,
        world: World = ALONE,
    ) -> None:
        self.config = config
        self.console = console or run_console()
        self.world = world
        self.device = world.device(resolve_device(config.device))
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.autocast = autocast(self.device, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.out_dir = Path(config.out_dir)
        check_folder(self.out_dir)
        self._log = RunLog(config)
        self._resumed = False
        self.iter_num = 0
        self._n_updates: int = config.max_iters
        self.val_loss = math.nan
        self.best_val_loss = math.inf
        self.best_iter: int | None = None
        torch.manual_seed(config.seed)

    def _build_optimizer(
        self,
        model: Trainable,
        weight_decay: float,
        peak: float,
        betas: tuple[float, float],
        masters: bool = True,
    ) -> torch.optim.Optimizer:
        """AdamW for the model, in bfloat16 with float32 master weights if ``masters``. ``peak`` is
        the highest learning rate."""
        self._peak = peak
        if masters and self.dtype == torch.bfloat16:
            return MasterAdamW(model, self.dtype, weight_decay, peak, betas, self.world)
        return model.configure_optimizers(weight_decay, peak, betas, self.device.type)

    def _build_step(
        self, loss: nn.Module, micro_batches: int = 1, cuda_graph: bool = False
    ) -> None:
        self.loss = loss
        self._step = Step(
            loss,
            self.optimizer,
            self.device,
            micro_batches=micro_batches,
            grad_clip=self.config.grad_clip,
            autocast=self.autocast,
            scaler=self.scaler,
            cuda_graph=cuda_graph,
            world=self.world,
        )

    def learning_rate(self, iteration: int) -> float:
        raise NotImplementedError

    def _updated(self, batches: Sequence[Any], learning_rate: float) -> Tensor:
        """Make one update; return its mean loss, on the device."""
        loss = self._step(batches, learning_rate)
        if self.device.type != "cuda":
            self._check_finite()  # would synchronize on a GPU
        return loss

    def _check_finite(self) -> None:
        if not self._step.not_finite:
            return
        self.world.barrier()
        kept = [*checkpoint_folder.saved(self.out_dir), self.out_dir / self.NEWEST]
        last = next((path for path in kept if path.exists()), "none yet")
        raise FloatingPointError(
            f"the loss or its gradient is not finite at iteration {self.iter_num} or after the "
            "previous report; no further update was made. Either training diverged (try a smaller "
            f"learning_rate than {self._peak:.3g}) or all targets of a batch are ignored. Last "
            f"good checkpoint: {last}"
        )

    @contextmanager
    def _own_out_dir(self) -> Iterator[None]:
        """Lock ``out_dir`` for this run, move away the files of an earlier run, open the log."""
        if not self.world.is_main:
            yield
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.out_dir):
            if not self._resumed:
                moved = checkpoint_folder.archive_previous_run(self.out_dir, self.FILES)
                if moved:
                    self.console.print(
                        f"the checkpoints and logs of an earlier run are now in {moved}"
                    )
            is_over = self.iter_num >= self._n_updates  # a finished run is evaluated once more
            evaluates = is_over or self.iter_num % self.config.eval_interval == 0
            with self._log.opened(self.config, self.iter_num, evaluates):
                yield

    def _report_losses(self, losses: Mapping[str, float]) -> None:
        self.val_loss = losses["val"]
        self.console.print(
            f"step {self.iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        )

    def _record(self, losses: Mapping[str, float], mfu: float | None = None) -> bool:
        """Print and log the losses of an evaluation. Returns whether the validation loss is the
        best so far; raises FloatingPointError if it is not finite."""
        self._report_losses(losses)
        if self.world.is_main:
            row = {f"{split}/loss": loss for split, loss in losses.items()}
            row["lr"] = self.learning_rate(self.iter_num)
            row["mfu"] = -1.0 if mfu is None else 100 * mfu  # as in nanoGPT
            self._log.write(self.iter_num, row, to_wandb=True)
        if not math.isfinite(losses["val"]):
            self._step.not_finite.fill_(1.0)
            self._check_finite()
        improved = losses["val"] < self.best_val_loss
        if improved:
            self.best_val_loss, self.best_iter = losses["val"], self.iter_num
        return improved

    def _state(self) -> ckpt.Checkpoint:
        """The part common to all checkpoints: weights, optimizer, shape and progress."""
        held = self.optimizer if isinstance(self.optimizer, MasterAdamW) else None
        return {
            "model": held.master_state_dict() if held else self.model.state_dict(),
            "optimizer": saved_state(self.optimizer),
            "model_args": asdict(self.model.config),
            "iter_num": self.iter_num,
            "best_val_loss": torch.tensor(self.best_val_loss),
        }

    def _own_state(self) -> dict[str, Any]:
        """State that nanoGPT does not save: random generators and gradient scaler."""
        return {"generators": random_states(self.device), "scaler": self.scaler.state_dict()}

    def _language_model_state(
        self, config: TrainConfig, tokenizer: Tokenizer | None, **own: Any
    ) -> ckpt.Checkpoint:
        """``_state`` in nanoGPT's format, with ``own`` under the key ``fastgpt``."""
        kind = {**ckpt.kind_and_gelu(self.model), **packed(tokenizer)}
        return {
            **self._state(),
            "config": asdict(config),
            "fastgpt": {**kind, **self._own_state(), **own},
        }

    def _restore(self, saved: ckpt.Checkpoint, own: Mapping[str, Any], path: Path) -> None:
        """Restore optimizer and progress from a checkpoint; ``own`` is its ``_own_state`` or empty.

        Raises ValueError naming ``path`` if something is missing.
        """
        try:
            # Take the moments from the file, the options (betas, weight decay, fused) from here.
            state = saved["optimizer"]
            for old, new in zip(state["param_groups"], self.optimizer.param_groups, strict=True):
                old.update({key: value for key, value in new.items() if key != "params"})
            self._load_optimizer(state, path)
            self.iter_num = int(saved["iter_num"])
            self.best_val_loss = float(saved["best_val_loss"])
            if own:
                self._restore_own(own)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} has no state to resume from: {error}") from error
        self._resumed = True

    def _load_optimizer(self, state: dict[str, Any], path: Path) -> None:
        self.optimizer.load_state_dict(state)

    def _restore_own(self, own: Mapping[str, Any]) -> None:
        set_random_states(own["generators"], self.device)
        if self.scaler.is_enabled() and own["scaler"]:
            self.scaler.load_state_dict(own["scaler"])

    def _update(self, learning_rate: float) -> tuple[Mapping[str, float | Tensor], int]:
        """Make one update; return its metrics and its number of tokens."""
        raise NotImplementedError

    def evaluate(self) -> Figures:
        raise NotImplementedError

    def _evaluate(self) -> bool:
        """Evaluate, print and log. Returns whether to publish the state as ``ckpt.pt``."""
        figures = self.evaluate()
        self.console.print(f"step {self.iter_num}: {_listed(figures)}")
        self._log.write(self.iter_num, {f"val/{key}": v for key, v in figures.items()})
        return True

    def _save(self, publish: bool) -> Path | None:
        """Write the state before update ``iter_num``. Returns the path, or None if the model cannot
        be saved."""
        raise NotImplementedError

    def _stop(self, figures: Mapping[str, float | Tensor]) -> str | None:
        """The reason to end the run after an update with these metrics, or None."""
        return None

    def _shown(self, figures: Figures, speed: float) -> tuple[str, Figures]:
        """The text of a report, and further metrics for the log. ``speed``: tokens per second since
        the last report."""
        return f"{_listed(figures)}, {speed:,.0f} tokens/s", {}

    def run(self) -> None:
        """Train; evaluate and save every ``eval_interval`` updates and at the end.

        Ctrl-C finishes the current update, saves and raises KeyboardInterrupt. Raises
        FloatingPointError if a loss is not finite, without making that update or saving; ValueError
        if another process trains into ``out_dir``.
        """
        config = self.config
        with (
            self._own_out_dir(),
            progress_bar("training", console=self.console) as show,
            interrupts() as interrupted,
        ):
            stopped, reason, text = False, None, ""
            since, tokens = perf_counter(), 0  # since the last report
            while self.iter_num < self._n_updates and not (stopped or reason):
                if self.iter_num % config.eval_interval == 0:
                    self._check_finite()  # waits for the updates, whose time counts
                    start = perf_counter()
                    publish = self._evaluate()
                    if self.iter_num > 0:
                        self._save(publish)
                    since += perf_counter() - start  # leave evaluation out of the speed
                learning_rate = self.learning_rate(self.iter_num)
                found, n_tokens = self._update(learning_rate)
                tokens += n_tokens
                reason = self._stop(found)
                if self.iter_num % config.log_interval == 0 or reason:
                    self._check_finite()
                    figures = {key: float(value) for key, value in found.items()}
                    speed = tokens / (perf_counter() - since)
                    since, tokens = perf_counter(), 0
                    text = self._report(figures, learning_rate, speed)
                self.iter_num += 1
                show(self.iter_num / self._n_updates, f"{self.iter_num}/{self._n_updates} {text}")
                stopped = self.world.any(interrupted.is_set())
                if stopped:
                    interrupted.set()
            self._check_finite()
            if not stopped:
                if reason:
                    self.console.print(f"ended before iteration {self.iter_num}: {reason}")
                self._save(self._evaluate())  # for the updates since the last evaluation
                return
            # Still within `interrupts`, because the signal may reach this rank while it saves.
            if saved := self._save(publish=False):
                self.console.print(
                    f"stopped before iteration {self.iter_num}; saved {saved}. Resume "
                    f"{self._how_to_resume}"
                )
            self.world.barrier()
        raise KeyboardInterrupt

    def _report(self, figures: Figures, learning_rate: float, speed: float) -> str:
        """Log the metrics of an update. Returns the text for the progress bar, and prints it if
        there is no bar."""
        text, more = self._shown(figures, speed)
        if self.world.is_main:
            row = {**figures, "lr": learning_rate, "tokens_per_second": speed, **more}
            self._log.write(self.iter_num, row)
        if not self.console.is_interactive:
            self.console.print(f"iter {self.iter_num}: {text}")
        return text


def _listed(figures: Figures) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items())


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets. A second signal acts as usual.

    Only the main thread receives signals; in other threads the event is never set. If a second
    signal ends another rank of an interrupted run, this rank ends with KeyboardInterrupt.
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
    except RuntimeError as error:
        if event.is_set() and is_of_collective(error):
            raise KeyboardInterrupt from error
        raise
    finally:
        restore()
