"""The training loop: nanoGPT's schedule, accumulation, clipping and evaluation.

    trainer = Trainer(TrainConfig(**PRESETS["char-cpu"]))
    trainer.run()

One update at iteration i = learning rate of i → ``gradient_accumulation_steps`` batches forward and
backward → clip → AdamW. A checkpoint of iteration i holds the state before that update, with the
random generators and the place in the data: a run resumed from it is the run that was never
stopped.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastgpt._files import check_folder, exclusive_lock
from fastgpt._progress import PlainConsole, run_console
from fastgpt.data.batches import SPLITS, Batches, fingerprint
from fastgpt.data.manifest import read_manifest
from fastgpt.devices import (
    autocast,
    peak_flops,
    random_states,
    resolve_device,
    resolve_dtype,
    set_random_states,
)
from fastgpt.language_model import LanguageModel
from fastgpt.model import A100_PEAK_FLOPS, GPT
from fastgpt.tokenizer import packed, saved_tokenizer
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder, init_from
from fastgpt.training.config import TrainConfig
from fastgpt.training.distributed import ALONE, World
from fastgpt.training.log import LOG, TENSORBOARD, RunLog
from fastgpt.training.optimizer import MasterAdamW, saved_state
from fastgpt.training.progress import Meter, interrupts
from fastgpt.training.step import Step

if TYPE_CHECKING:
    from rich.console import Console


class Trainer:
    """A run: model, optimizer, data and progress.

    Building it draws the initial weights or loads a checkpoint; ``run`` trains. Attributes that
    are of use afterwards: ``config``, ``model`` (on ``device``), ``tokenizer`` (None for GPT-2's
    tokens), ``iter_num``, ``val_loss`` of the last evaluation, ``best_val_loss``, ``best_iter``.

    Raises what the config, the data set and the checkpoint raise: ValueError, TypeError,
    FileNotFoundError, NotADirectoryError, ImportError.
    """

    def __init__(
        self,
        config: TrainConfig,
        console: "Console | PlainConsole | None" = None,
        world: World = ALONE,
    ) -> None:
        self.config = config
        self.world = world
        self.console = console or run_console()
        self.device = world.device(resolve_device(config.device))
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._sharded = init_from.is_sharded(config, world)
        if self._sharded and self.dtype == torch.float16:
            raise ValueError("dtype must be float32 or bfloat16 with parallel='fsdp', got float16")
        if config.gradient_accumulation_steps % world.size:
            raise ValueError(
                f"gradient_accumulation_steps must be a multiple of the {world.size} processes "
                f"that share them, got {config.gradient_accumulation_steps}"
            )
        self.out_dir = Path(config.out_dir)
        check_folder(self.out_dir)
        self._log = RunLog(config)
        torch.manual_seed(config.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True

        # A missing file is named before weights are drawn or downloaded.
        self._data_fingerprint = fingerprint(config.data_dir)
        self.tokenizer = saved_tokenizer(config.data_dir)
        found = read_manifest(config.data_dir)
        if found is not None and found.dialogues and not config.document_mask:
            self.config = config = replace(config, document_mask=True)
            self.console.print(
                "document_mask = True comes from the data set, which is of dialogues"
            )
        saved, path = None, self.out_dir
        if config.init_from == "resume":
            saved, path = init_from.saved_state(
                config, self.tokenizer, self._data_fingerprint, world
            )
        model = self._build_model(saved, path)
        self.config = config = self._with_shape_of(model)
        self.batches = Batches(
            config.data_dir,
            config.batch_size,
            config.block_size,
            self.device,
            config.seed,
            vocab_size=model.config.vocab_size,
            rank=world.rank,
            world_size=world.size,
        )
        if self.batches.note:
            self.console.print(f"note: {self.batches.note}")
        self.model = model.to(self.device)
        trained = self._parallel_model()
        self.optimizer = self._build_optimizer()
        self._autocast = autocast(self.device, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self._step = Step(
            trained,
            self.optimizer,
            self.device,
            micro_batches=config.gradient_accumulation_steps // world.size,
            grad_clip=config.grad_clip,
            autocast=self._autocast,
            scaler=self.scaler,
            cuda_graph=self._uses_cuda_graph(),
            world=world,
        )
        self.iter_num = 0
        self.val_loss = math.nan
        self.best_val_loss = math.inf
        self.best_iter: int | None = None
        if saved is not None:
            self._restore(saved, path)

    def _build_model(self, saved: ckpt.Checkpoint | None, path: Path) -> LanguageModel:
        config = self.config
        if saved is None:
            model = init_from.new_model(config, self.tokenizer)
        else:  # a sharded run reads a folder's tensors later, into its shards
            weights = not (self._sharded and path.is_dir())
            model = ckpt.build_model(saved, path, dropout=config.dropout, weights=weights)
        if isinstance(model, GPT):
            model.recompute = config.recompute
            model.fp8 = config.fp8
            model.eot_token = init_from.eot_token(config, self.tokenizer)
        return model

    def _with_shape_of(self, model: LanguageModel) -> TrainConfig:
        """The config with the shape of a loaded model; what changes is printed."""
        shape = init_from.shape_of(model)
        for key, value in shape.items():
            asked = getattr(self.config, key)
            if value != asked:
                self.console.print(f"{key} = {value} comes from the loaded model (not {asked})")
        return replace(self.config, **shape)

    def _parallel_model(self) -> torch.nn.Module:
        """The model as ``Step`` takes it: compiled, sharded or in DDP, as the config says."""
        self._forward: torch.nn.Module = self.model
        if self._sharded:
            # Imported where it is needed: it takes half as long as PyTorch itself.
            from fastgpt.training import fsdp

            fsdp.shard(self.model, self.device, self.world, self.dtype)
            if self.config.compile:
                self.model.compile()
        elif self.config.compile:
            self._forward = cast(torch.nn.Module, torch.compile(self.model))
        if self.world.size > 1:
            torch.manual_seed(self.config.seed + self.world.rank)  # dropout differs between ranks
        if self.world.size == 1 or self._sharded:
            return self._forward
        return DistributedDataParallel(self._forward, gradient_as_bucket_view=True)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config, model = self.config, self.model
        betas = (config.beta1, config.beta2)
        # Several processes exchange float32 gradients of float32 weights, under autocast.
        if self.dtype == torch.bfloat16 and self.world.size == 1:
            return MasterAdamW(model, self.dtype, config.weight_decay, config.learning_rate, betas)
        return model.configure_optimizers(
            config.weight_decay, config.learning_rate, betas, self.device.type
        )

    def _uses_cuda_graph(self) -> bool:
        """Not in float16, where the host decides on an update, nor in several processes, whose
        collectives are not captured, nor with torch.compile, which allocates by itself."""
        alone_on_gpu = self.device.type == "cuda" and self.world.size == 1
        if not (alone_on_gpu and self.dtype != torch.float16 and self.config.cuda_graph):
            return False
        if self.config.compile:
            self.console.print("compile=True: updates are not replayed as a CUDA graph")
        return not self.config.compile

    def _restore(self, saved: ckpt.Checkpoint, path: Path) -> None:
        own = ckpt.own_state(saved)
        try:
            # The moments come from the file, the options (betas, weight decay, fused) from here.
            state = saved["optimizer"]
            for old, new in zip(state["param_groups"], self.optimizer.param_groups, strict=True):
                old.update({k: v for k, v in new.items() if k != "params"})
            if self._sharded:
                from fastgpt.training import fsdp, sharded_checkpoint
            if self._sharded and path.is_dir():
                moments = fsdp.empty_state(self.optimizer)
                state["state"] = sharded_checkpoint.load_into(self.model, moments, path)
            elif self._sharded:
                state["state"] = fsdp.shard_optimizer_state(state["state"], self.optimizer)
            self.optimizer.load_state_dict(state)
            self.iter_num = int(saved["iter_num"])
            self.best_val_loss = float(saved["best_val_loss"])
            if own:
                self.best_iter = own["best_iter"]
                self.batches.load_state_dict(own["data"])
                states = own["generators"]  # of each rank; a new one keeps its own
                if self.world.rank < len(states):
                    set_random_states(states[self.world.rank], self.device)
                if self.scaler.is_enabled() and own["scaler"]:
                    self.scaler.load_state_dict(own["scaler"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path} holds no state to go on from: {error}") from error
        if init_from.is_of_other_data(saved, self._data_fingerprint):
            # Its best loss is one of other validation data.
            self.best_val_loss, self.best_iter = math.inf, None
            self.console.print(f"{path} was trained on other data than {self.config.data_dir}")
        self.console.print(f"going on from {path} at iteration {self.iter_num}")

    def learning_rate(self, iteration: int) -> float:
        """Linear warm-up, cosine down to ``min_lr``, then ``min_lr``."""
        config = self.config
        if not config.decay_lr:
            return config.learning_rate
        if iteration < config.warmup_iters:
            return config.learning_rate * (iteration + 1) / (config.warmup_iters + 1)
        if iteration >= config.lr_decay_iters:
            return config.min_lr
        done = (iteration - config.warmup_iters) / (config.lr_decay_iters - config.warmup_iters)
        return config.min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (
            config.learning_rate - config.min_lr
        )

    def run(self) -> None:
        """Train up to and including iteration ``max_iters``; evaluate and save on the way.

        Ctrl-C ends the update in progress, saves and raises KeyboardInterrupt. A loss that is not
        finite raises FloatingPointError: that update is not made, nothing is saved. ValueError if
        another process trains into ``out_dir``.
        """
        config = self.config
        self.model.train()
        if config.eval_only:
            self._report_losses(self.evaluate())
            return
        with (
            self._own_out_dir(),
            self._log.opened(config, self.iter_num) if self.world.is_main else nullcontext(),
            self._meter() as meter,
            interrupts() as interrupted,
        ):
            stopped = False
            while self.iter_num <= config.max_iters:
                if self.iter_num % config.eval_interval == 0:
                    with meter.paused():
                        self._evaluate_and_save(meter.mfu)
                learning_rate = self.learning_rate(self.iter_num)
                loss = self._update(learning_rate)
                if self.iter_num % config.log_interval == 0:
                    self._check_finite()
                    mean = loss.item()
                    speed = meter.report(self.iter_num, mean)
                    if self.world.is_main:
                        self._log.report(self.iter_num, mean, learning_rate, speed, meter.mfu)
                self.iter_num += 1
                if stopped := self.world.any(interrupted.is_set()):
                    break
            self._check_finite()
            if not stopped:
                self._evaluate_and_save(meter.mfu)  # for the updates since the last evaluation
                return
        saved = self._save(publish=False)
        self.console.print(
            f"stopped before iteration {self.iter_num}; saved {saved}. Go on "
            f"with: fastgpt train --init_from=resume --out_dir={config.out_dir}"
        )
        raise KeyboardInterrupt

    def _meter(self) -> Meter:
        model = self.model
        if self.device.type != "cuda" or not isinstance(model, GPT):
            return Meter(self.config, self.console, self.iter_num, None)
        gpu = torch.cuda.get_device_name(self.device)
        peak = peak_flops(gpu)
        if peak is None:
            self.console.print(f"no mfu: the peak of {gpu} is not known")
            return Meter(self.config, self.console, self.iter_num, None)
        scale = A100_PEAK_FLOPS / peak  # of nanoGPT's figure
        size = self.world.size  # the figure is that of one GPU, which has a share of the sequences
        return Meter(
            self.config,
            self.console,
            self.iter_num,
            lambda sequences, seconds: scale * model.estimate_mfu(sequences // size, seconds),
        )

    @contextmanager
    def _own_out_dir(self) -> Iterator[None]:
        """``out_dir`` locked for this run, without an earlier run's files."""
        if not self.world.is_main:
            yield
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(self.out_dir):
            if self.config.init_from != "resume":
                moved = checkpoint_folder.archive_previous_run(self.out_dir, (LOG, TENSORBOARD))
                if moved:
                    self.console.print(
                        f"the checkpoints and logs of an earlier run are now in {moved}"
                    )
            yield

    def _update(self, learning_rate: float) -> Tensor:
        """One optimizer step; the mean loss of its batches, on the device."""
        batches = [self.batches.next("train", place) for place in self._step.inputs]
        loss = self._step(batches, learning_rate)
        if self.device.type != "cuda":
            self._check_finite()  # costs nothing where the host does not run ahead
        return loss

    def _check_finite(self) -> None:
        if not self._step.not_finite:
            return
        kept = checkpoint_folder.saved(self.out_dir)
        raise FloatingPointError(
            f"the loss or its gradient is not finite at iteration {self.iter_num} or since the "
            "last report before it; no update was made from there on. Either training diverged "
            f"(try a smaller learning_rate than {self.config.learning_rate}) or every target of a "
            f"batch is ignored. Last good checkpoint: {kept[0] if kept else 'none yet'}"
        )

    def evaluate(self) -> dict[str, float]:
        """The mean loss of the targets in ``eval_iters`` batches of each split, ``{"train": ..,
        "val": ..}``: of the same batches at every call. Collective: every rank must call it; they
        share the batches.
        """
        was_training = self.model.training
        self.model.eval()
        losses = {split: self._mean_loss(split) for split in SPLITS}
        self.model.train(was_training)
        return losses

    @torch.no_grad()
    def _mean_loss(self, split: str) -> float:
        count, size = self.config.eval_iters, self.world.size
        # The ranks of a sharded model run it equally often; a surplus result is discarded.
        losses, n_valid = [], []
        for x, y in self.batches.evaluation(split, -(-count // size) * size):
            with self._autocast:
                losses.append(self._forward(x, y)[1])
            n_valid.append((y != -1).sum())
        mine = len(range(self.world.rank, count, size))
        # Each batch weighs as many targets as it has: exactly 1 where all have the same number.
        counts = torch.stack(n_valid)[:mine]
        weights = counts * count / self.world.all_reduce(counts.sum())
        weighted = (torch.stack(losses)[:mine] * weights).sum()
        return (self.world.all_reduce(weighted) / count).item()

    def _evaluate_and_save(self, mfu: float | None) -> None:
        losses = self.evaluate()
        self._report_losses(losses)
        if self.world.is_main:
            learning_rate = self.learning_rate(self.iter_num)
            self._log.evaluation(self.iter_num, losses["train"], losses["val"], learning_rate, mfu)
        if not math.isfinite(losses["val"]):
            self._step.not_finite.fill_(1.0)
            self._check_finite()
        improved = losses["val"] < self.best_val_loss
        if improved:
            self.best_val_loss, self.best_iter = losses["val"], self.iter_num
        if self.iter_num > 0:
            self._save(publish=improved or self.config.always_save_checkpoint)

    def _report_losses(self, losses: dict[str, float]) -> None:
        self.val_loss = losses["val"]
        self.console.print(
            f"step {self.iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        )

    def _save(self, publish: bool) -> Path:
        """Save the state before ``iter_num``, with ``publish`` also as ``ckpt.pt``."""
        own: dict[str, Any] = {
            **ckpt.kind_and_gelu(self.model),
            **packed(self.tokenizer),
            "generators": self.world.all_gather_object(random_states(self.device)),
            "data": self.batches.state_dict(),
            "data_fingerprint": self._data_fingerprint,
            "scaler": self.scaler.state_dict(),
            "best_iter": self.best_iter,
        }
        if isinstance(self.optimizer, MasterAdamW):
            weights = self.optimizer.master_state_dict()
        else:
            weights = self.model.state_dict(keep_vars=self._sharded)
        state = {
            "model": weights,
            "optimizer": saved_state(self.optimizer),
            "model_args": ckpt.model_args(self.model),
            "iter_num": self.iter_num,
            "best_val_loss": torch.tensor(self.best_val_loss),
            "config": asdict(self.config),
            "fastgpt": own,
        }
        path = checkpoint_folder.path_of(self.out_dir, self.iter_num, self._sharded)
        if self._sharded:
            from fastgpt.training import sharded_checkpoint

            sharded_checkpoint.save(state, path, self.world)
        elif self.world.is_main:
            ckpt.save(state, path)
        if self.world.is_main:
            if publish:
                ckpt.publish(path, self.out_dir / ckpt.BEST)
            checkpoint_folder.prune(self.out_dir, self.config.keep_last, self.best_iter)
        return path

    def full_model(self) -> LanguageModel:
        """The model, for one process to use alone; a copy if it is sharded. Collective: every rank
        must call it.
        """
        if not self._sharded:
            return self.model
        from fastgpt.training import fsdp

        state = {
            "model": fsdp.full_state_dict(self.model),
            "model_args": ckpt.model_args(self.model),
            "fastgpt": ckpt.kind_and_gelu(self.model),
        }
        return ckpt.build_model(state, self.out_dir).to(self.device)
