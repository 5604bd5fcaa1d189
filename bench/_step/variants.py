"""The variants of the training step, the options of a run, and the training of one variant."""

import importlib.util
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench._step import baselines
from fastgpt import GPT, GPTConfig
from fastgpt.data.batches import Batches
from fastgpt.devices import autocast, resolve_dtype
from fastgpt.language_model import LanguageModel
from fastgpt.training.optimizer import MasterAdamW
from fastgpt.training.step import Step

Loss = Callable[[Any, Tensor, Tensor], Tensor]  # model, idx (B, T), targets (B, T) → scalar


def _naive_loss(gpt: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    return baselines.loss(gpt, idx, targets, baselines.naive)


def _sdpa_loss(gpt: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    return baselines.loss(gpt, idx, targets, baselines.sdpa)


def _fastgpt_loss(gpt: GPT, idx: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = gpt(idx, targets)[1]
    return loss


class Package(NamedTuple):
    """A third-party kernel package for CUDA GPUs from ``least_capability`` on."""

    name: str
    module: str
    distribution: str
    least_capability: tuple[int, int]


PACKAGES = {
    "liger": Package("Liger-Kernel", "liger_kernel", "liger-kernel", (0, 0)),
    "quack": Package("QuACK", "quack", "quack-kernels", (9, 0)),
}


@dataclass(frozen=True)
class Variant:
    label: str
    loss: Loss
    compile_mode: str | None = None  # of torch.compile; None runs eagerly
    attention: SDPBackend | None = None  # SDPA backend; None: PyTorch chooses
    trainer: bool = False  # use the update of `fastgpt train` instead of nanoGPT's
    recompute: bool = False
    fp8: str = "none"
    package: str | None = None  # key in PACKAGES of a package that it needs

    @property
    def baseline(self) -> bool:
        """Whether it does not use this library's ops."""
        return self.loss is not _fastgpt_loss

    @property
    def huggingface(self) -> bool:
        return self.loss is baselines.huggingface_loss


_COMPILED = "nanoGPT, SDPA, torch.compile"
_TUNED = "max-autotune-no-cudagraphs"

VARIANTS: dict[str, Variant] = {
    "sdpa_compile": Variant(_COMPILED, _sdpa_loss, "default"),
    "fastgpt_train": Variant("fastgpt train", _fastgpt_loss, trainer=True),
    "fastgpt": Variant("fastgpt", _fastgpt_loss),
    "sdpa": Variant("nanoGPT, SDPA", _sdpa_loss),
    "sdpa_liger": Variant("nanoGPT, SDPA, Liger", baselines.liger_loss, package="liger"),
    "naive": Variant("nanoGPT, masked matmul", _naive_loss),
    "huggingface": Variant("Hugging Face, SDPA", baselines.huggingface_loss),
    "sdpa_flash": Variant(
        f"{_COMPILED} (Flash)", _sdpa_loss, "default", SDPBackend.FLASH_ATTENTION
    ),
    "sdpa_cudnn": Variant(
        f"{_COMPILED} (cuDNN)", _sdpa_loss, "default", SDPBackend.CUDNN_ATTENTION
    ),
    "sdpa_chunked": Variant(f"{_COMPILED} (chunked loss)", baselines.chunked_loss, "default"),
    "sdpa_graphs": Variant(f"{_COMPILED} (reduce-overhead)", _sdpa_loss, "reduce-overhead"),
    "sdpa_autotune": Variant(f"{_COMPILED} (max-autotune)", _sdpa_loss, _TUNED),
    "fastgpt_recompute": Variant("fastgpt, recompute", _fastgpt_loss, recompute=True),
    "fastgpt_compile": Variant("fastgpt, torch.compile", _fastgpt_loss, "default"),
    "fastgpt_train_recompute": Variant(
        "fastgpt train, recompute", _fastgpt_loss, trainer=True, recompute=True
    ),
    "fastgpt_fp8_head": Variant("fastgpt train, fp8 head", _fastgpt_loss, trainer=True, fp8="head"),
    "fastgpt_again": Variant("fastgpt again", _fastgpt_loss),
}

# sdpa_graphs crashed a run of six variants on an H200 with a segmentation fault (bench/LOG.md).
_NOT_BY_DEFAULT = "sdpa_graphs", "sdpa_autotune", "fastgpt_fp8_head"

_WEIGHT_DECAY, _BETAS, _GRAD_CLIP = 0.1, (0.9, 0.95), 1.0  # nanoGPT's
_REFERENCE_SEQUENCES = 4  # at a time: the float32 reference stores all scores and logits


@dataclass(frozen=True, kw_only=True)
class Options:
    """Tokens per second, step time, memory, time to the first step and loss of GPT training:
    nanoGPT's step in eager PyTorch and under torch.compile, and fastgpt, side by side.
    """

    # Variants to measure, in this order: sdpa_compile, fastgpt_train, fastgpt, sdpa, sdpa_liger (if
    # liger-kernel is installed), naive, huggingface, sdpa_flash, sdpa_cudnn, sdpa_chunked,
    # sdpa_graphs, sdpa_autotune, fastgpt_recompute, fastgpt_compile, fastgpt_train_recompute,
    # fastgpt_fp8_head; and fastgpt_again, which shows the noise. Default: all but sdpa_graphs,
    # sdpa_autotune and fastgpt_fp8_head.
    variants: tuple[str, ...] = tuple(name for name in VARIANTS if name not in _NOT_BY_DEFAULT)
    # Sequences per batch. Default: the largest of 32, 16, 8 and so on for which nanoGPT's eager
    # step of GPT-2 124M fits into the GPU's memory.
    batch_size: int = 32
    # Tokens per sequence.
    block_size: int = 1024
    # Transformer blocks.
    n_layer: int = 12
    # Attention heads; must divide n_embd.
    n_head: int = 12
    # Embedding width.
    n_embd: int = 768
    # Rows of the embedding and the head. The default makes them cost what they cost in GPT-2,
    # although the built-in corpus, of characters, uses only about a hundred.
    vocab_size: int = GPTConfig.vocab_size
    # Biases in Linear and LayerNorm.
    bias: bool = True
    # Autocast dtype; auto: bfloat16 on a GPU that supports it, float16 on an older one, float32
    # elsewhere. In float16 the loss is scaled as in nanoGPT, by PyTorch's gradient scaler.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # Constant learning rate of AdamW.
    learning_rate: float = 3e-4
    # Seed of the weights and the batches.
    seed: int = 1337
    # Also train nanoGPT's model in float32, to compare the losses with. Default: with up to four
    # sequences; with 32 it takes longer than everything else.
    reference: bool | None = None
    # Steps whose losses are compared with those of the float32 reference.
    loss_steps: int = 100
    # Warm-up steps before the first round.
    warmup: int = 20
    # Rounds.
    rounds: int = 5
    # Timed steps per variant and round.
    steps: int = 20
    # Folder with train.bin and val.bin. Default: the built-in corpus, prepared for this run.
    data_dir: Path | None = None
    # Folder for run-b<batch_size>.json and .png, which must not exist yet. Default: a new folder in
    # bench/out, which git ignores.
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.loss_steps < 2:
            raise ValueError(f"loss_steps must be at least 2, got {self.loss_steps}")
        chosen = set(self.variants)
        if not 0 < len(chosen) == len(self.variants) or not chosen <= set(VARIANTS):
            raise ValueError(
                f"variants must be one or more of {', '.join(VARIANTS)}, each once, "
                f"got {' '.join(self.variants) or 'none'}"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")


# --quick: the most important comparison, in less than 100 seconds on an H100.
QUICK: dict[str, Any] = dict(
    variants=("sdpa_compile", "fastgpt_train", "fastgpt", "sdpa"),
    loss_steps=50,
    warmup=5,
    rounds=3,
    steps=10,
)

# Takes a minute, half of it for the C++ compiler that torch.compile calls.
CPU_OPTIONS = Options(
    variants=("sdpa_compile", "fastgpt", "sdpa", "naive", "fastgpt_recompute", "fastgpt_again"),
    batch_size=4,
    block_size=64,
    n_layer=2,
    n_head=4,
    n_embd=128,
    vocab_size=256,
    loss_steps=20,
    warmup=5,
    steps=10,
)

_BYTES_OF_A_SEQUENCE = 1.1e9  # of that step: 32.6 GB with 32 on an H200 (bench/results)


def default_options() -> Options:
    """For this machine."""
    if not torch.cuda.is_available():
        return CPU_OPTIONS
    batch_size, memory = Options.batch_size, torch.cuda.get_device_properties(0).total_memory
    while batch_size > 1 and batch_size * _BYTES_OF_A_SEQUENCE > memory:
        batch_size //= 2
    return Options(batch_size=batch_size)


@dataclass(frozen=True)
class Plan:
    """The options, resolved for this machine."""

    options: Options
    config: GPTConfig
    device: torch.device
    dtype: torch.dtype
    data_dir: Path

    @classmethod
    def of(cls, options: Options, data_dir: Path) -> "Plan":
        config = GPTConfig(
            block_size=options.block_size,
            vocab_size=options.vocab_size,
            n_layer=options.n_layer,
            n_head=options.n_head,
            n_embd=options.n_embd,
            bias=options.bias,
        )
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        return cls(options, config, device, resolve_dtype(options.dtype, device), data_dir)

    @property
    def has_reference(self) -> bool:
        asked = self.options.reference
        return self.options.batch_size <= _REFERENCE_SEQUENCES if asked is None else asked

    @property
    def tokens_per_step(self) -> int:
        return self.options.batch_size * self.options.block_size

    def batches(self, vocab_size: int | None = None) -> Batches:
        """The batches of one training. With ``vocab_size``, check all token ids first."""
        o = self.options
        return Batches(self.data_dir, o.batch_size, o.block_size, self.device, o.seed, vocab_size)


def optimizer_of(model: nn.Module, variant: Variant, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW as a user of the variant would configure it."""
    device_type = next(model.parameters()).device.type
    # Hugging Face's model has the same parameters but not this method.
    optimizer = LanguageModel.configure_optimizers(
        cast(LanguageModel, model), _WEIGHT_DECAY, learning_rate, _BETAS, device_type
    )
    if variant.baseline and device_type == "cpu":
        for group in optimizer.param_groups:
            group["fused"] = None  # nanoGPT uses the fused AdamW only on CUDA
    return optimizer


class Training:
    """The training of a variant, starting from the initial weights and the first batch."""

    def __init__(self, variant: Variant, plan: Plan, dtype: torch.dtype | None = None) -> None:
        dtype = dtype or plan.dtype
        self.device = plan.device
        rate = plan.options.learning_rate
        torch.manual_seed(plan.options.seed)
        gpt = GPT(plan.config, recompute=variant.recompute, fp8=variant.fp8).to(plan.device)
        self._model = baselines.huggingface_model(gpt) if variant.huggingface else gpt
        self._loss = variant.loss
        self._attention = variant.attention
        if variant.compile_mode is not None:
            self._loss = torch.compile(variant.loss, mode=variant.compile_mode)
        self._autocast = autocast(plan.device, dtype)
        self._batches = plan.batches()
        self._rate = rate
        is_scaled = dtype == torch.float16
        self._scaler = torch.amp.GradScaler(plan.device.type, enabled=is_scaled)
        self._graphs = variant.compile_mode == "reduce-overhead"
        self._step: Step | None = None
        if variant.trainer:
            self._optimizer: torch.optim.Optimizer = (
                MasterAdamW(gpt, dtype, _WEIGHT_DECAY, rate, _BETAS)
                if dtype == torch.bfloat16
                else optimizer_of(gpt, variant, rate)
            )
            self._step = Step(
                gpt,
                self._optimizer,
                plan.device,
                grad_clip=_GRAD_CLIP,
                autocast=self._autocast,
                scaler=self._scaler,
                cuda_graph=plan.device.type == "cuda" and not is_scaled,
            )
        else:
            self._optimizer = optimizer_of(self._model, variant, rate)

    def step(self) -> Tensor:
        """Run one optimizer step and return its loss, on the device."""
        x, y = self._batches.next("train")
        if self._step is not None:
            return self._step([(x, y)], self._rate)
        loss = self._backward(x, y)
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _GRAD_CLIP)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def _backward(self, x: Tensor, y: Tensor) -> Tensor:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        # Set outside of the compiled function, which specialises on it when it is traced.
        chosen = nullcontext() if self._attention is None else sdpa_kernel(self._attention)
        with self._autocast, chosen:
            loss = self._loss(self._model, x, y)
        self._scaler.scale(loss).backward()
        return loss.detach().clone()  # with CUDA graphs, the next step overwrites it


class ReferenceTraining(Training):
    """nanoGPT's step in float32, accumulating gradients over slices of the batch to save memory."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(VARIANTS["naive"], plan, torch.float32)

    def _backward(self, x: Tensor, y: Tensor) -> Tensor:
        total = torch.zeros((), device=x.device)
        slices = zip(x.split(_REFERENCE_SEQUENCES), y.split(_REFERENCE_SEQUENCES), strict=True)
        for x_slice, y_slice in slices:
            loss = self._loss(self._model, x_slice, y_slice) * (len(x_slice) / len(x))
            loss.backward()
            total += loss.detach()
        return total


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Context that sets whether float32 products on the GPU use TF32, as in ``fastgpt train``."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def compiled_code_in(folder: Path) -> AbstractContextManager[object]:
    """Context in which torch.compile and Triton cache compiled code in ``folder``."""
    keys = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    return mock.patch.dict(os.environ, {key: str(folder / name) for key, name in keys.items()})


def why_not(variant: Variant, device: torch.device, bias: bool = True) -> str | None:
    """Why this machine cannot measure the variant, or not with this ``bias``; None if it can."""
    if variant.huggingface and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    if variant.huggingface and not bias:
        return "transformers' GPT-2 always has biases"
    if variant.package == "liger" and not bias:
        return "Liger-Kernel's LayerNorm always has a bias"
    if variant.package is not None:
        return package_why_not(variant.package, device)
    if variant.fp8 != "none" and not _has_fp8(device):
        return "fp8 needs a GPU of compute capability 8.9"
    if variant.loss is baselines.chunked_loss and not hasattr(F, "linear_cross_entropy"):
        return "PyTorch 2.13 is the first with F.linear_cross_entropy"
    if variant.attention is not None and device.type == "cpu":
        return "a choice of attention needs a GPU"
    if variant.compile_mode is None or device.type != "cpu":
        return None
    if variant.compile_mode == "reduce-overhead":
        return "CUDA graphs need a GPU"
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "no Python.h"
    return None


def package_why_not(key: str, device: torch.device) -> str | None:
    """Why this machine cannot measure the package ``key`` of PACKAGES; None if it can."""
    package = PACKAGES[key]
    if device.type != "cuda":
        return f"{package.name} needs a CUDA GPU"
    if torch.cuda.get_device_capability(device) < package.least_capability:
        major, minor = package.least_capability
        return f"{package.name} needs a GPU of compute capability {major}.{minor}"
    if importlib.util.find_spec(package.module) is None:
        return f"{package.name} is not installed (pip install {package.distribution})"
    return None


def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def load_compiler(device: torch.device) -> None:
    """Call torch.compile once, so that no variant's first step includes loading it."""
    x = torch.ones(64, device=device, requires_grad=True)
    torch.compile(torch.sin)(x).sum().backward()
