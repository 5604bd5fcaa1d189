"""``fastgpt train``: its keys, the run, and the table and sample at the end."""

import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from fastgpt.cli.prepare import BUILTIN, report_prepared
from fastgpt.data import builtin_texts, manifest
from fastgpt.devices import autocast, resolve_device, triton_refusal
from fastgpt.language_model import LanguageModel
from fastgpt.model import GPT
from fastgpt.sampler import start_ids, write
from fastgpt.tokenizer import GPT2Tokenizer
from fastgpt.training import checkpoint as ckpt
from fastgpt.training import checkpoint_folder
from fastgpt.training.config import (
    GROUPS,
    RENAMED_KEYS,
    Data,
    Logging,
    Model,
    Optimizer,
    Output,
    Schedule,
    System,
    TrainConfig,
)
from fastgpt.training.config_file import keys_of
from fastgpt.training.distributed import World
from fastgpt.training.presets import PRESETS, automatic_keys
from fastgpt.training.trainer import Trainer

# the sample at the end of a training run
_SAMPLE_TOKENS, _SAMPLE_TEMPERATURE, _SAMPLE_TOP_K = 300, 0.8, 200


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model.

    Without arguments: a GPT on the built-in corpus, with the preset for this machine: char on a
    CUDA GPU, else the first half of char-cpu. A key takes its value from the command line, else
    from CONFIG.py, else from the preset, else the default shown here. With --init_from=resume and
    neither preset nor CONFIG.py, the checkpoint's keys replace these defaults.
    """

    config_file: Annotated[
        tyro.conf.Positional[Path | None],
        tyro.conf.arg(
            metavar="[CONFIG.py|PRESET]",
            help="A configuration file in nanoGPT's format: assignments such as n_layer = 6. It is "
            "read, not executed. Or the name of a preset.",
            help_behavior_hint="(default: none)",
        ),
    ] = None
    preset: Annotated[
        str | None,
        tyro.conf.arg(
            constructor=tyro.extras.literal_type_from_choices(PRESETS),
            metavar="PRESET",
            help="char: 10.6M parameters on characters, for a GPU. char-cpu: 0.8M, a few minutes "
            "on a CPU. gpt2: the defaults below, GPT-2 124M on OpenWebText. nanoGPT's "
            "configurations, without wandb_log: train_gpt2, train_shakespeare_char, "
            "finetune_shakespeare, eval_gpt2, eval_gpt2_medium, eval_gpt2_large, eval_gpt2_xl.",
            help_behavior_hint="(default: by device; none with CONFIG.py)",
        ),
    ] = None
    output: Output = field(default_factory=Output)
    logging: Logging = field(default_factory=Logging)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    system: System = field(default_factory=System)

    def keys(self) -> dict[str, Any]:
        """The values of all keys in one dict."""
        groups = (getattr(self, group.__name__.lower()) for group in GROUPS)
        return {key: value for group in groups for key, value in asdict(group).items()}


def train_defaults(base: dict[str, Any]) -> Train:
    """A ``Train`` with the keys of ``base`` set."""
    groups: dict[str, Any] = {
        group.__name__.lower(): group(
            **{f.name: base[f.name] for f in fields(group) if f.name in base}
        )
        for group in GROUPS
    }
    return Train(**groups)


def keys_below(first: Train) -> dict[str, Any]:
    """The keys of preset and file, which wins; without both, the checkpoint's or automatic ones."""
    base: dict[str, Any] = {}
    if first.preset is not None:
        base.update(PRESETS[first.preset])
    if first.config_file is not None:
        base.update(keys_of(first.config_file))
    if first.preset is None and first.config_file is None:
        if first.output.init_from == "resume":
            base.update(_saved_keys(Path(first.output.out_dir)))
        else:
            base.update(automatic_keys())
    return base


def _saved_keys(out_dir: Path) -> dict[str, Any]:
    """The keys of the run to resume. For a checkpoint of nanoGPT's, without ``compile``, which
    is on by default there."""
    header, path = checkpoint_folder.read_newest(out_dir, ckpt.header)
    ckpt.refuse_translation(header, path)
    saved = header.get("config", {})
    known = {f.name for f in fields(TrainConfig)}
    if not ckpt.own_state(header):
        known.remove("compile")
    saved = {RENAMED_KEYS.get(key, key): value for key, value in saved.items()}
    return {key: value for key, value in saved.items() if key in known}


def run_train(config: TrainConfig, world: World, console: Console) -> None:
    """Train with ``config`` on all ranks of ``world``. Raises like ``Trainer``."""
    out_dir = Path(config.out_dir)
    if world.restarts and (checkpoint_folder.saved(out_dir) or (out_dir / ckpt.BEST).exists()):
        config = replace(config, init_from="resume")  # torchrun restarted this command
    device = world.device(resolve_device(config.device))
    with world.connected(device, config.backend):
        _train_connected(config, world, console)


def _train_connected(config: TrainConfig, world: World, console: Console) -> None:
    # str(time.time()) in a configuration file differs between the processes.
    config = world.all_gather_object(config)[0]
    changed = ", ".join(f"{key}={value}" for key, value in config.differences().items())
    console.print(f"keys that differ from the defaults: {changed or 'none'}")
    data_dir = config.data_dir
    prepared = any((data_dir / name).exists() for name in ("train.bin", manifest.NAME))
    if world.is_main and config.dataset == BUILTIN and not prepared:
        report_prepared(data_dir, builtin_texts.prepare_builtin(data_dir), console)
    world.barrier()
    trainer = Trainer(config, console, world)
    console.print(
        f"{config.model} with {trainer.model.get_num_params():,} parameters on {trainer.device}, "
        f"{str(trainer.dtype).removeprefix('torch.')}"
    )
    _tune(trainer, console)
    trainer.run()
    if not config.eval_only:
        model = trainer.full_model()
        if world.is_main:
            console.print(_summary(trainer))
            path, _ = checkpoint_folder.for_sampling(trainer.out_dir)
            where = "" if config.out_dir == "out" else f" --out_dir={shlex.quote(config.out_dir)}"
            if trainer.batches.of_dialogues:
                console.print(f"saved {path}. Talk to it: fastgpt sample --chat{where}")
            else:
                _print_sample(trainer, model, console)
                console.print(f"saved {path}. Generate text with it: fastgpt sample{where}")


def _tune(trainer: Trainer, console: Console) -> None:
    """Find the fastest launch configurations for the model, unless that was done before. Not for a
    resumed run, because other configurations round differently."""
    config, model, device = trainer.config, trainer.model, trainer.device
    wanted = config.tune and not config.eval_only and config.init_from != "resume"
    if not wanted or not trainer.world.is_main or not isinstance(model, GPT):
        return
    if device.type != "cuda" or triton_refusal(device):
        return
    from fastgpt.tuning import Workload  # needs Triton
    from fastgpt.tuning.before_training import tune_before_training

    work = Workload(
        model.config,
        config.batch_size,
        trainer.dtype,
        config.recompute,
        config.document_mask,
    )
    tune_before_training(work, device, console.print, trainer.world.size)


def _summary(trainer: Trainer) -> Table:
    """A table of losses: the trained model's over random batches, a bigram's over all of val."""
    data_dir, shape = trainer.config.data_dir, trainer.model.config
    table = Table(title="Validation loss in nats per token, lower is better")
    table.add_column("model")
    table.add_column("parameters", justify="right")
    table.add_column("loss", justify="right")
    parameters = f"{trainer.model.get_num_params():,}"
    table.add_row(trainer.config.model, parameters, f"{trainer.val_loss:.4f}")
    if trainer.best_iter not in (None, trainer.iter_num):
        kept = f"best, at iteration {trainer.best_iter}"
        table.add_row(kept, parameters, f"{trainer.best_val_loss:.4f}")
    if trainer.batches.of_dialogues:
        table.caption = "Over the tokens of answers only."
        return table
    if shape.vocab_size > builtin_texts.MAX_BIGRAM_VOCAB_SIZE:
        table.caption = f"No bigram table: {shape.vocab_size} x {shape.vocab_size} is too large."
        return table
    counts, val_counts = (
        builtin_texts.bigram_counts(data_dir, split, shape.vocab_size) for split in ("train", "val")
    )
    loss = builtin_texts.bigram_loss(counts, val_counts)
    table.add_row("bigram, counted on train.bin", f"{counts.size:,}", f"{loss:.4f}")
    entropy = builtin_texts.bigram_entropy(val_counts)
    table.add_row("bigram entropy of val.bin", "", f"{entropy:.4f}")
    return table


def _print_sample(trainer: Trainer, model: LanguageModel, console: Console) -> None:
    try:
        tokenizer = trainer.tokenizer or GPT2Tokenizer()
    except (ImportError, ConnectionError) as error:
        console.print(f"no sample: {error}")
        return
    text = write(
        model.eval(),
        tokenizer,
        start_ids(tokenizer),
        _SAMPLE_TOKENS,
        _SAMPLE_TEMPERATURE,
        _SAMPLE_TOP_K,
        autocast(trainer.device, trainer.dtype),
    )
    console.rule("sample")
    console.out(text)  # print would expand tabs
