"""The training loop: nanoGPT's schedule, accumulation, clipping and evaluation.

    trainer = Trainer(TrainConfig(**PRESETS["char-cpu"]))
    trainer.run()

Iteration i: set the learning rate → forward and backward of ``gradient_accumulation_steps`` batches
→ clip → AdamW. A checkpoint of iteration i contains the state before that update, including the
random generators and the position in the data: a run resumed from it continues exactly as if it had
not been stopped.
"""

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastgpt._progress import AnyConsole
from fastgpt.data.batches import SPLITS, Batches, fingerprint
from fastgpt.data.manifest import read_manifest
from fastgpt.devices import peak_flops, random_states
from fastgpt.language_model import GPTConfig, LanguageModel
from fastgpt.model import A100_PEAK_FLOPS, GPT
from fastgpt.tokenizer import saved_tokenizer
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder, init_from
from fastgpt.training.config import TrainConfig
from fastgpt.training.distributed import ALONE, World
from fastgpt.training.log import LOG, TENSORBOARD
from fastgpt.training.run import Figures, Run


class Trainer(Run):
    """A training run: model, optimizer, data and progress.

    The constructor initializes the weights or loads a checkpoint; ``run`` trains. Useful attributes
    afterwards: ``config``, ``model`` (on ``device``), ``tokenizer`` (None for GPT-2's tokens),
    ``iter_num``, ``val_loss`` of the last evaluation, ``best_val_loss``, ``best_iter``.

    ``build`` constructs a custom model with the config's shape. No checkpoints are written then,
    because loading them could not construct the model.

    Raises the errors of the config, the data set and the checkpoint: ValueError, TypeError,
    FileNotFoundError, NotADirectoryError, ImportError.
    """

    config: TrainConfig
    model: LanguageModel
    FILES = (LOG, TENSORBOARD)

    def __init__(
        self,
        config: TrainConfig,
        console: "AnyConsole | None" = None,
        world: World = ALONE,
        build: Callable[[GPTConfig], LanguageModel] | None = None,
    ) -> None:
        if build is not None and config.init_from != "scratch":
            raise ValueError(
                f"init_from must be scratch with a custom model, got {config.init_from!r}"
            )
        super().__init__(config, console, world)
        self._n_updates = config.max_iters + 1
        out_dir = shlex.quote(config.out_dir)
        self._how_to_resume = f"with: fastgpt train --init_from=resume --out_dir={out_dir}"
        self._build = build
        self._mfu: float | None = None
        self._is_warm = False  # the first report includes compilation
        self._sharded = init_from.is_sharded(config, world)
        if self._sharded and self.dtype == torch.float16:
            raise ValueError("dtype must be float32 or bfloat16 with parallel='fsdp', got float16")
        if config.gradient_accumulation_steps % world.size:
            raise ValueError(
                f"gradient_accumulation_steps must be a multiple of the {world.size} processes "
                f"that share them, got {config.gradient_accumulation_steps}"
            )
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True

        # Before the weights are initialized or downloaded, so that a missing file fails early.
        self._data_fingerprint = fingerprint(config.data_dir)
        self.tokenizer = saved_tokenizer(config.data_dir)
        found = read_manifest(config.data_dir)
        if found is not None:
            self._check_tokenizer(found.tokenizer)
        if found is not None and found.dialogues and not config.document_mask:
            self.config = config = replace(config, document_mask=True)
            self.console.print("document_mask = True, because the data set consists of dialogues")
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
        betas = (config.beta1, config.beta2)
        self.optimizer = self._build_optimizer(
            self.model, config.weight_decay, config.learning_rate, betas, masters=not self._sharded
        )
        micro_batches = config.gradient_accumulation_steps // world.size
        self._build_step(trained, micro_batches, self._uses_cuda_graph())
        if saved is not None:
            self._resume(saved, path)

    def _check_tokenizer(self, of_data: Mapping[str, Any]) -> None:
        """Raise ValueError unless the data set's folder has the tokenizer that made its tokens."""
        own = None if self.tokenizer is None else self.tokenizer.fingerprint
        if of_data.get("file") and of_data.get("fingerprint") != own:
            raise ValueError(
                f"{self.config.data_dir / of_data['file']} must be the tokenizer of the data set's "
                f"tokens, but is {'missing' if own is None else 'a different one'}"
            )

    def _build_model(self, saved: ckpt.Checkpoint | None, path: Path) -> LanguageModel:
        config = self.config
        if saved is None:
            model = init_from.new_model(config, self.tokenizer, self._build)
        else:  # from a folder, a sharded run reads the tensors later, directly into its shards
            weights = not (self._sharded and path.is_dir())
            model = ckpt.build_model(saved, path, dropout=config.dropout, weights=weights)
        if isinstance(model, GPT):
            model.recompute = config.recompute
            model.fp8 = config.fp8
            model.eot_token = init_from.eot_token(config, self.tokenizer)
        return model

    def _with_shape_of(self, model: LanguageModel) -> TrainConfig:
        """The config with the shape of the loaded model. Prints each key that changes."""
        shape = init_from.shape_of(model)
        for key, value in shape.items():
            asked = getattr(self.config, key)
            if value != asked:
                self.console.print(f"{key} = {value} comes from the loaded model (not {asked})")
        return replace(self.config, **shape)

    def _parallel_model(self) -> torch.nn.Module:
        """The model for ``Step``: compiled, sharded or wrapped in DDP, as the config says."""
        self._forward: torch.nn.Module = self.model
        if self._sharded:
            # Imported late: it takes half as long as importing PyTorch itself.
            from fastgpt.training import fsdp

            fsdp.shard(self.model, self.device, self.world, self.dtype)
            if self.config.compile:
                self.model.compile()
        elif self.config.compile:
            self._forward = cast(torch.nn.Module, torch.compile(self.model))
        if self.world.size > 1:
            torch.manual_seed(self.config.seed + self.world.rank)  # dropout differs between ranks
        if self.world.size == 1 or self._sharded or self._has_masters:
            return self._forward
        return DistributedDataParallel(self._forward, gradient_as_bucket_view=True)

    @property
    def _has_masters(self) -> bool:
        """Whether bfloat16 weights have float32 master weights. FSDP2 has its own mechanism."""
        return self.dtype == torch.bfloat16 and not self._sharded

    def _uses_cuda_graph(self) -> bool:
        """Only on a GPU. Not in float16, where the host decides whether to update; not where DDP or
        FSDP2 all-reduce in the backward; not with torch.compile, which manages its own memory."""
        exchanges = self.world.size > 1 and not self._has_masters
        on_gpu = self.device.type == "cuda" and not exchanges
        if not (on_gpu and self.dtype != torch.float16 and self.config.cuda_graph):
            return False
        if self.config.compile:
            self.console.print("compile=True: updates are not replayed as a CUDA graph")
        return not self.config.compile

    def _resume(self, saved: ckpt.Checkpoint, path: Path) -> None:
        self._restore(saved, ckpt.own_state(saved), path)
        if init_from.is_of_other_data(saved, self._data_fingerprint):
            # Its best loss is from other validation data.
            self.best_val_loss, self.best_iter = math.inf, None
            self.console.print(f"{path} was trained on other data than {self.config.data_dir}")
        self.console.print(f"resuming from {path} at iteration {self.iter_num}")

    def _load_optimizer(self, state: dict[str, Any], path: Path) -> None:
        if self._sharded:
            from fastgpt.training import fsdp, sharded_checkpoint

            if path.is_dir():
                moments = fsdp.empty_state(self.optimizer)
                state["state"] = sharded_checkpoint.load_into(self.model, moments, path)
            else:
                state["state"] = fsdp.shard_optimizer_state(state["state"], self.optimizer)
        super()._load_optimizer(state, path)

    def _restore_own(self, own: Mapping[str, Any]) -> None:
        self.best_iter = own["best_iter"]
        self.batches.load_state_dict(own["data"])
        states, rank = own["generators"], self.world.rank
        mine = states[rank] if rank < len(states) else random_states(self.device)  # a new rank
        super()._restore_own({**own, "generators": mine})

    def learning_rate(self, iteration: int) -> float:
        """Linear warm-up, cosine decay to ``min_lr``, then ``min_lr``."""
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
        """Like ``Run.run``, up to and including iteration ``max_iters``; with ``eval_only`` only
        one evaluation. Collective: every rank must call it.
        """
        self.model.train()
        if self.config.eval_only:
            self._report_losses(self.evaluate())
            return
        self._mfu_scale = self._found_mfu_scale()
        super().run()

    def _found_mfu_scale(self) -> float:
        """The factor from nanoGPT's MFU, relative to an A100's peak, to one relative to this GPU's
        peak; 0 if that is not known."""
        if self.device.type != "cuda" or not isinstance(self.model, GPT):
            return 0.0
        gpu = torch.cuda.get_device_name(self.device)
        peak = peak_flops(gpu)
        if peak is None:
            self.console.print(f"no mfu: the peak of {gpu} is not known")
        return A100_PEAK_FLOPS / peak if peak else 0.0

    def _shown(self, figures: Figures, speed: float) -> tuple[str, Figures]:
        sequences = self.config.batch_size * self.config.gradient_accumulation_steps
        seconds = sequences * self.config.block_size / speed  # of an update
        text, more = f"loss {figures['loss']:.4f}, {speed:,.0f} tokens/s", {}
        if self._mfu_scale and self._is_warm:
            assert isinstance(self.model, GPT)
            # MFU is per GPU, which processes a share of the sequences.
            mfu = self.model.estimate_mfu(sequences // self.world.size, seconds) * self._mfu_scale
            self._mfu = mfu if self._mfu is None else 0.9 * self._mfu + 0.1 * mfu
            text += f", mfu {100 * self._mfu:.1f}%"
            more = {"mfu": 100 * self._mfu}
        self._is_warm = True
        return f"{text}, {1000 * seconds:.1f} ms", more

    def _update(self, learning_rate: float) -> tuple[dict[str, Tensor], int]:
        batches = [self.batches.next("train", pair) for pair in self._step.inputs]
        n_tokens = batches[0][0].numel() * self.config.gradient_accumulation_steps
        return {"loss": self._updated(batches, learning_rate)}, n_tokens

    def evaluate(self) -> dict[str, float]:
        """The mean loss over the targets of ``eval_iters`` batches per split, ``{"train": ..,
        "val": ..}``. The batches are the same at every call. Collective: every rank must call it;
        the ranks share the batches.
        """
        was_training = self.model.training
        self.model.eval()
        losses = {split: self._mean_loss(split) for split in SPLITS}
        self.model.train(was_training)
        return losses

    @torch.no_grad()
    def _mean_loss(self, split: str) -> float:
        count, size = self.config.eval_iters, self.world.size
        # All ranks of a sharded model must run it equally often; surplus results are discarded.
        losses, n_valid = [], []
        for x, y in self.batches.evaluation(split, -(-count // size) * size):
            with self.autocast:
                losses.append(self._forward(x, y)[1])
            n_valid.append((y != -1).sum())
        mine = len(range(self.world.rank, count, size))
        # Weight each batch by its number of targets: exactly 1 if all have the same number.
        counts = torch.stack(n_valid)[:mine]
        weights = counts * count / self.world.all_reduce(counts.sum())
        weighted = (torch.stack(losses)[:mine] * weights).sum()
        return (self.world.all_reduce(weighted) / count).item()

    def _evaluate(self) -> bool:
        return self._record(self.evaluate(), self._mfu) or self.config.always_save_checkpoint

    def _save(self, publish: bool) -> Path | None:
        if self._build is not None:
            return None
        state = self._language_model_state(
            self.config,
            self.tokenizer,
            generators=self.world.all_gather_object(random_states(self.device)),
            data=self.batches.state_dict(),
            data_fingerprint=self._data_fingerprint,
            best_iter=self.best_iter,
        )
        path = checkpoint_folder.path_of(self.out_dir, self.iter_num, self._sharded)
        if self._sharded:
            from fastgpt.training import sharded_checkpoint

            state["model"] = self.model.state_dict(keep_vars=True)
            sharded_checkpoint.save(state, path, self.world)
        elif self.world.is_main:
            ckpt.save(state, path)
        if self.world.is_main:
            if publish:
                ckpt.publish(path, self.out_dir / ckpt.BEST)
            checkpoint_folder.prune(self.out_dir, self.config.keep_last, self.best_iter)
        return path

    def full_model(self) -> LanguageModel:
        """The whole model, usable by a single process; a copy if it is sharded. Collective: every
        rank must call it.
        """
        if not self._sharded:
            return self.model
        from fastgpt.training import fsdp

        state = {
            "model": fsdp.full_state_dict(self.model),
            "model_args": asdict(self.model.config),
            "fastgpt": ckpt.kind_and_gelu(self.model),
        }
        return ckpt.build_model(state, self.out_dir).to(self.device)
