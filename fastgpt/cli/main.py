"""The command line: parse, run one command, turn errors into exit codes."""

import contextlib
import errno
import functools
import operator
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

import fastgpt
from fastgpt._files import without_errno
from fastgpt._progress import escape_unprintable
from fastgpt.assistant.reward import RewardConfig, RewardTraining
from fastgpt.assistant.rl import ReinforcementLearning, RLConfig
from fastgpt.cli.arguments import normalized
from fastgpt.cli.doctor import DoctorConfig, doctor
from fastgpt.cli.ladder import LadderConfig, run_ladder
from fastgpt.cli.plot import PlotConfig, plot
from fastgpt.cli.prepare import Prepare, TrainTokenizer, run_prepare, run_train_tokenizer, shown
from fastgpt.cli.sample import run_sample
from fastgpt.cli.train import Train, keys_below, run_train, train_defaults
from fastgpt.cli.translate import TRANSLATION_MARKS, Translate, run_translate, run_translate_train
from fastgpt.cli.tune import TuneConfig, run_tune
from fastgpt.devices import is_native, resolve_device
from fastgpt.interop.export import ExportConfig, export
from fastgpt.training.config import SampleConfig, TrainConfig
from fastgpt.training.distributed import World
from fastgpt.translation.config import TranslationConfig


def _annotate(command: type, **marks: tuple[Any, ...]) -> None:
    """Annotate fields for tyro, in a class that does not import it. Their types do not change."""
    for name, of_field in marks.items():
        for mark in of_field:
            command.__annotations__[name] = Annotated[command.__annotations__[name], mark]


_annotate(
    SampleConfig,
    start=(shown(None, "a line break"),),
    stop=(tyro.conf.UseAppendAction, shown("TEXT", "none")),
)
_annotate(ExportConfig, output=(shown("PATH", "hf, model.safetensors or nanogpt in out_dir"),))
_annotate(
    PlotConfig,
    folders=(tyro.conf.Positional, shown("[OUT_DIR ...]", "out")),
    output=(shown("FILE.png", "curves.png in the folder; with several, in the current one"),),
)
_annotate(
    LadderConfig,
    input=(shown("FILE", "the sources of Python's standard library"),),
    rungs=(shown("RUNG ...", "all; without a GPU all but scaled"),),
)

_annotate(TranslationConfig, **TRANSLATION_MARKS)

_NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
_WRITE_ERRORS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EPIPE)

# Name → the dataclass of its options, and the function that runs it, given the options, a console
# for results and one for errors and progress. The function may return an exit code.
_COMMANDS: dict[str, tuple[type, Callable[[Any, Console, Console], int | None]]] = {
    "prepare": (Prepare, lambda given, out, _: run_prepare(given, out)),
    "tokenizer": (TrainTokenizer, lambda given, out, _: run_train_tokenizer(given, out)),
    "train": (Train, lambda given, out, _: run_train(given, World.from_environment(), out)),
    "tune": (TuneConfig, lambda given, out, _: run_tune(given, out)),
    "sample": (SampleConfig, run_sample),
    "reward": (RewardConfig, lambda given, out, _: _reward(given, out)),
    "rl": (RLConfig, lambda given, out, _: _rl(given, out)),
    "export": (ExportConfig, lambda given, out, _: _export(given, out)),
    "plot": (PlotConfig, lambda given, out, _: out.print(f"wrote {plot(given)}")),
    "ladder": (LadderConfig, run_ladder),
    "translate": (Translate, lambda given, out, _: run_translate(given, out)),
    "translate train": (TranslationConfig, lambda given, out, _: run_translate_train(given, out)),
    "doctor": (DoctorConfig, lambda given, out, _: doctor(out)),
}


def _unchecked(options: Any) -> type:
    """A subclass of ``options`` without its checks, whose errors tyro would show in a box."""
    if not hasattr(options, "__post_init__"):
        return options

    class Unchecked(options):  # written out: tyro reads the source of every class for its help
        __doc__ = options.__doc__

        def __post_init__(self) -> None:
            pass

    return Unchecked


def _parse(argv: list[str], defaults: Train) -> Any:
    """Return an instance of a class of ``_COMMANDS``. Raises ValueError or TypeError for values
    that the class rejects; the keys of ``Train`` are not checked yet."""
    if argv[:2] == ["translate", "train"]:
        argv = ["translate train", *argv[2:]]
    commands: list[Any] = []
    for name, (options, _) in _COMMANDS.items():
        default: dict[str, Any] = {"default": defaults} if options is Train else {}
        commands.append(Annotated[_unchecked(options), tyro.conf.subcommand(name, **default)])
    union: Any = functools.reduce(operator.or_, commands)
    args = normalized(argv, {name: options for name, (options, _) in _COMMANDS.items()})
    found = tyro.cli(
        union,
        prog="fastgpt",
        description="Train GPT-2-class models and sample from them. --version shows the version.",
        args=args,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )
    (options,) = [options for options, _ in _COMMANDS.values() if isinstance(found, options)]
    return options(**vars(found))


def _train_config(argv: list[str], first: Train, console: Console) -> TrainConfig:
    """The keys in order of precedence: command line, configuration file, preset, defaults.

    ``first`` is ``argv`` parsed with the plain defaults, which gives preset and file. ``argv`` is
    then parsed again with their keys as the defaults. If the device does not support a checkpoint's
    dtype, it becomes auto, with a notice. A dtype from the command line does not change.
    """
    below = keys_below(first)
    second = _parse(argv, train_defaults(below))
    assert isinstance(second, Train)
    config = TrainConfig(**second.keys())
    asked = any(argument.partition("=")[0] == "--dtype" for argument in argv)
    of_checkpoint = first.preset is None and first.config_file is None and "dtype" in below
    if config.init_from != "resume" or not of_checkpoint or asked:
        return config
    device = resolve_device(config.device)
    if is_native(config.dtype, device):
        return config
    console.print(f"dtype = auto, since {device} does not support the checkpoint's {config.dtype}")
    return replace(config, dtype="auto")


def _reward(config: RewardConfig, console: Console) -> None:
    RewardTraining(config, console).run()
    reward = shlex.quote(config.out_dir)
    console.print(f"saved {config.out_dir}. Train with it: fastgpt rl --reward={reward}")


def _rl(config: RLConfig, console: Console) -> None:
    ReinforcementLearning(config, console).run()
    out_dir = shlex.quote(config.out_dir)
    console.print(f"saved {config.out_dir}. Talk to it: fastgpt sample --chat --out_dir={out_dir}")


def _export(config: ExportConfig, console: Console) -> None:
    exported = export(config)
    console.print(f"wrote {exported.path}")
    for note in exported.notes:
        console.print(f"note: {note}")


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is None and error.errno in _WRITE_ERRORS:
        error.filename = "stdout"  # errors of all other files have a name
        _drop_stdout()
    return without_errno(error)


def _drop_stdout() -> None:
    """Discard unwritten output: Python would write it at exit and report the error again."""
    with contextlib.suppress(OSError):  # io.UnsupportedOperation: stdout is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default); returns the exit code.

    0: done. 1: the run failed (diverged, out of memory, no connection, disk full). 2: a wrong
    argument, configuration, data set or checkpoint, or a missing package. 130: interrupted
    (training saves its state).
    """
    escape_unprintable()
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    argv = sys.argv[1:] if argv is None else argv
    try:
        world = World.from_environment()
        console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not world.is_main)
        if argv[:1] == ["--version"]:
            console.print(f"fastgpt {fastgpt.__version__}")
            return 0
        command = _parse(argv, Train())
        (run,) = [run for options, run in _COMMANDS.values() if type(command) is options]
        if isinstance(command, Train):
            command = _train_config(argv, command, console)
        return run(command, console, errors) or 0
    except (
        ValueError,
        TypeError,
        FileNotFoundError,
        FileExistsError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
        ImportError,
    ) as error:
        errors.print(f"error: {_message(error)}", style="bold red")
        return 2
    except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
        errors.print(f"error: {_message(error)}", style="bold red")
        return 1
    except (MemoryError, RuntimeError) as error:
        # PyTorch raises a plain RuntimeError if the CPU's memory is exhausted.
        if not isinstance(error, MemoryError) and not any(t in str(error) for t in _NO_MEMORY):
            raise
        cause = ": ".join(["out of memory", *str(error).splitlines()[:1]])
        errors.print(f"error: {cause}", style="bold red")
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted", style="bold red")
        return 130
