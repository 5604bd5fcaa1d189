"""The configuration keys of a run, with nanoGPT's names and defaults.

The keys are grouped into small dataclasses, one per heading of ``--help``; ``TrainConfig`` inherits
all of them. A key's annotation is its type, the comment above it its help text.
"""

import difflib
import math
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fastgpt._files import is_path
from fastgpt.model import PRETRAINED_SHAPES

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

INIT_FROM = ("scratch", "resume", *PRETRAINED_SHAPES)


@dataclass(frozen=True, kw_only=True)
class Output:
    # Folder for ckpt.pt (best or newest), iter-*.pt (to resume from) and log.jsonl (losses).
    out_dir: str = "out"
    # Updates between two evaluations; each also writes a checkpoint.
    eval_interval: int = 2000
    # Updates between two reports of the loss.
    log_interval: int = 1
    # Batches per split in one evaluation.
    eval_iters: int = 200
    # Evaluate once, then stop.
    eval_only: bool = False
    # Write ckpt.pt at every evaluation, not only when the validation loss improves.
    always_save_checkpoint: bool = True
    # Newest checkpoints to keep, besides the best.
    keep_last: int = 2
    # scratch, resume (from out_dir), or pretrained weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    # distilgpt2, the path of a folder or .safetensors file written by `fastgpt export` or
    # transformers, or another run's folder, of which the best (or newest) weights are used.
    init_from: str = "scratch"


@dataclass(frozen=True, kw_only=True)
class Logging:
    # Log to Weights & Biases (needs wandb).
    wandb_log: bool = False
    # Weights & Biases project.
    wandb_project: str = "owt"
    # Weights & Biases run name.
    wandb_run_name: str = "gpt2"
    # Write TensorBoard files to out_dir/tensorboard (needs tensorboard).
    tensorboard_log: bool = False


@dataclass(frozen=True, kw_only=True)
class Data:
    # Folder with one subfolder per data set.
    data_root: str = "data"
    # The data set: a folder in data_root, written by `fastgpt prepare` or by nanoGPT.
    dataset: str = "openwebtext"
    # Batches per update, over all processes.
    gradient_accumulation_steps: int = 40
    # Sequences per batch.
    batch_size: int = 12
    # Tokens per sequence: the context length.
    block_size: int = 1024
    # Restrict attention and positions to each token's own document.
    document_mask: bool = False


@dataclass(frozen=True, kw_only=True)
class Model:
    # gpt, or the lookup-table baseline bigram.
    model: Literal["gpt", "bigram"] = "gpt"
    # Number of transformer blocks.
    n_layer: int = 12
    # Number of attention heads; must divide n_embd.
    n_head: int = 12
    # Width of the embeddings and of the residual stream.
    n_embd: int = 768
    # Dropout probability during training.
    dropout: float = 0.0
    # Use biases in Linear and LayerNorm layers.
    bias: bool = False
    # Recompute GELU and LayerNorm in the backward pass: less memory, the same results.
    recompute: bool = False
    # head: compute the loss with 8-bit matrix products. Needs a GPU of compute capability 8.9 or
    # newer, and n_embd and a vocabulary size divisible by 16.
    fp8: Literal["none", "head"] = "none"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    # Peak learning rate of AdamW.
    learning_rate: float = 6e-4
    # Number of the last update; the first is 0.
    max_iters: int = 600000
    # Weight decay of the matrices; vectors are not decayed.
    weight_decay: float = 0.1
    # Decay rate of AdamW's first moment.
    beta1: float = 0.9
    # Decay rate of AdamW's second moment.
    beta2: float = 0.95
    # Maximum gradient norm; 0 disables clipping.
    grad_clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Schedule:
    # Linear warm-up, then cosine decay; otherwise the learning rate is constant.
    decay_lr: bool = True
    # Number of warm-up updates.
    warmup_iters: int = 2000
    # Iteration at which the cosine decay reaches min_lr.
    lr_decay_iters: int = 600000
    # Learning rate after the decay.
    min_lr: float = 6e-5


@dataclass(frozen=True, kw_only=True)
class System:
    # How several processes train. ddp: each has the whole model. fsdp: each has a shard of every
    # tensor, which takes less memory and more communication.
    parallel: Literal["ddp", "fsdp"] = "ddp"
    # Communication backend of distributed runs on GPUs; on the CPU it is always gloo.
    backend: str = "nccl"
    # cuda, cuda:N, cpu, mps, or auto (cuda if available, else cpu).
    device: str = "cuda"
    # bfloat16: matrices in bfloat16, with float32 master weights. float16: autocast. auto: bfloat16
    # on a GPU that supports it, float16 on an older GPU, float32 elsewhere.
    dtype: Dtype = "auto"
    # Use torch.compile. Disables cuda_graph.
    compile: bool = False
    # On a GPU, replay every update as one CUDA graph; has no effect with float16.
    cuda_graph: bool = True
    # Before a run on a GPU, find the fastest kernel configurations for the model, once, for at
    # most 60 s. Not in distributed or resumed runs. See `fastgpt tune`.
    tune: bool = True
    # Seed for the weights, the batches and dropout.
    seed: int = 1337


GROUPS = (Output, Logging, Data, Model, Optimizer, Schedule, System)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(System, Schedule, Optimizer, Model, Data, Logging, Output):
    """Every key of a training run, with nanoGPT's names and defaults.

    Raises TypeError for a value of the wrong type (an int is accepted for a float) and ValueError
    for one out of range. Whether the device exists is only checked when a run starts.
    """

    def __post_init__(self) -> None:
        _check_types(self)
        check_limits(self)
        _check_init_from(self.init_from, INIT_FROM)
        if self.model == "bigram" and self.init_from not in ("scratch", "resume"):
            raise ValueError(
                f"init_from must be scratch or resume with model='bigram', got {self.init_from!r}"
            )
        if self.model == "bigram" and self.fp8 != "none":
            raise ValueError(f"fp8 must be none with model='bigram', got {self.fp8!r}")
        if self.decay_lr and self.min_lr > self.learning_rate:
            raise ValueError(
                f"min_lr must be at most learning_rate with decay_lr=True, "
                f"got min_lr={self.min_lr} with learning_rate={self.learning_rate}"
            )
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd must be a multiple of n_head, "
                f"got n_embd={self.n_embd} with n_head={self.n_head}"
            )

    @property
    def data_dir(self) -> Path:
        """The folder of ``train.bin`` and ``val.bin``."""
        return Path(self.data_root) / self.dataset

    def differences(self) -> dict[str, Any]:
        """The keys whose values are not the defaults."""
        default = asdict(TrainConfig())
        return {key: value for key, value in asdict(self).items() if value != default[key]}


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Generate text with a trained model."""

    # resume (ckpt.pt in out_dir), or pretrained weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    # distilgpt2, or the path of a folder or .safetensors file written by `fastgpt export` or
    # transformers. The folder may have a tokenizer (tokenizer.json, say); default: GPT-2's.
    init_from: str = "resume"
    # Folder of the checkpoint.
    out_dir: str = "out"
    # The prompt, or FILE:path to read it from a file.
    start: str = "\n"
    # Treat every line of the prompt as a separate prompt; empty lines are skipped.
    lines: bool = False
    # Read prompts from the terminal or a pipe, line by line, and write one sample for each.
    interactive: bool = False
    # Talk to a model that was fine-tuned on dialogues. Ends with /exit or the end of the input.
    chat: bool = False
    # The system message, for chat.
    system: str = ""
    # A .jsonl of dialogues, as for `fastgpt prepare --dialogues`: answer every question in it, and
    # count the answers that equal the file's. With json, print each answer.
    dialogues: str = ""
    # Number of samples per prompt.
    num_samples: int = 10
    # Samples generated in parallel. With 1 the text is shown as it is generated; more are faster.
    batch_size: int = 1
    # Tokens to generate per sample.
    max_new_tokens: int = 500
    # Below 1 is more cautious, above 1 more random; 0 always takes the likeliest token.
    temperature: float = 0.8
    # Sample from this many of the likeliest tokens.
    top_k: int = 200
    # Sample from the fewest tokens that together have this probability; 1: from all.
    top_p: float = 1.0
    # Exclude tokens less likely than this fraction of the likeliest.
    min_p: float = 0.0
    # Above 1, tokens that are already in the text become less likely.
    repetition_penalty: float = 1.0
    # End a sample before this text; may be given several times.
    stop: tuple[str, ...] = ()
    # Print a JSON object per sample: prompt, completion, tokens, finish (length or stop).
    json: bool = False
    # Seed for sampling.
    seed: int = 1337
    # cuda, cuda:N, cpu, mps, or auto (cuda if available, else cpu).
    device: str = "auto"
    # Autocast dtype. auto: bfloat16 on a GPU that supports it, float16 on older ones, else float32.
    dtype: Dtype = "auto"
    # Use torch.compile for whole forward passes (of a text longer than the context).
    compile: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        check_limits(self)
        _check_init_from(self.init_from, INIT_FROM[1:])
        if not self.start:
            raise ValueError("start must hold at least one character, got ''")
        if "" in self.stop:
            raise ValueError("stop must hold texts of at least one character, got ''")
        modes = ("chat", "dialogues", "interactive", "lines")
        given = [mode for mode in modes if getattr(self, mode)]
        if len(given) > 1:
            raise ValueError(f"give --{' or --'.join(given)}, not both")
        if self.chat and self.json:
            raise ValueError("json must be False with chat, got True")
        if self.system and not self.chat:
            raise ValueError(f"system must be empty without chat, got {self.system!r}")


_COUNTS = (
    "eval_interval log_interval eval_iters keep_last gradient_accumulation_steps batch_size "
    "block_size n_layer n_head n_embd num_samples max_new_tokens top_k max_length "
    "held_out batch_tokens shard_tokens workers eval_prompts beam"
)
_NOT_NEGATIVE = "learning_rate weight_decay grad_clip min_lr temperature kl_weight max_kl seconds"
_LARGEST = 2**48  # so that sums of sizes fit into PyTorch's integers
COUNT = 1, _LARGEST
COUNT_OR_0 = 0, _LARGEST
# Smallest and largest allowed value of each key, unless a command overrides them.
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_COUNTS.split(), COUNT),
    **dict.fromkeys(("max_iters", "warmup_iters", "lr_decay_iters"), COUNT_OR_0),
    **dict.fromkeys(_NOT_NEGATIVE.split(), (0, math.inf)),
    "vocab_size": (1, 2**24),  # training a tokenizer allocates them all at once
    "seed": (0, 2**63 - 1),
    "dropout": (0, 0.999),
    "beta1": (0, 0.999999),
    "beta2": (0, 0.999999),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "group_size": (2, _LARGEST),
    "label_smoothing": (0, 0.999999),
    "length_penalty": (0, 10),
    "val_share": (0, 1),
}


def _check_init_from(source: str, names: tuple[str, ...]) -> None:
    if source not in names and not is_path(source):
        raise ValueError(
            f"init_from must be one of {', '.join(names)}, or the path of a folder or of a "
            f".safetensors file, got {source!r}"
        )


def check_limits(config: Any, **limits: tuple[float, float]) -> None:
    """Raise ValueError for the first key of ``config`` that is outside its limits or not finite.
    ``limits`` overrides ``LIMITS``. None is allowed for any key."""
    for key, (low, high) in {**LIMITS, **limits}.items():
        value = getattr(config, key, None)
        if value is None or (low <= value <= high and math.isfinite(value)):
            continue
        allowed = f"lie between {low} and {high}"
        if math.isinf(high):
            allowed = f"be at least {low} and finite"
        elif high == _LARGEST and value < low:
            allowed = f"be at least {low}"
        raise ValueError(f"{key} must {allowed}, got {value}")


class Limited:
    """Base of dataclasses that raise ValueError for values outside ``LIMITS``."""

    def __post_init__(self) -> None:
        check_limits(self)


def _check_types(config: TrainConfig | SampleConfig) -> None:
    for key, value in vars(config).copy().items():
        object.__setattr__(config, key, typed(type(config), key, value))


_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}


def typed(owner: type, key: str, value: Any) -> Any:
    """Return ``value`` if it has the type of ``owner``'s ``key``. An int is converted to a float if
    that is the type. Raises TypeError or ValueError for any other value.
    """
    kind = typing.get_type_hints(owner)[key]
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            allowed = ", ".join(typing.get_args(kind))
            raise ValueError(f"{key} must be one of {allowed}, got {value!r}")
        return value
    if typing.get_origin(kind) is tuple:
        if type(value) is not tuple or not all(type(item) is str for item in value):
            raise TypeError(f"{key} must be a tuple of strings, got {value!r}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{key} must be {_KINDS[kind]}, got {value!r}")
    return value


# Former names of keys, which old checkpoints may contain.
RENAMED_KEYS = {"pack": "document_mask"}


def check_key(key: str) -> None:
    """Raise ValueError, suggesting the closest key, unless ``key`` is one of TrainConfig's."""
    known = [field.name for field in fields(TrainConfig)]
    if key in known:
        return
    near = difflib.get_close_matches(key, known, n=1)
    if key in RENAMED_KEYS:
        hint = f": it is called {RENAMED_KEYS[key]!r} now"
    elif near:
        hint = f": did you mean {near[0]!r}?"
    else:
        hint = f"; allowed: {', '.join(sorted(known))}"
    raise ValueError(f"unknown key {key!r}{hint}")
