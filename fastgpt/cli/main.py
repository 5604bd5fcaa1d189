"""The command line: ``fastgpt prepare``, ``train``, ``sample``, ``export``, and what is around."""

import sys
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from fastgpt.cli.doctor import DoctorConfig, doctor
from fastgpt.cli.plot import PlotConfig, plot
from fastgpt.cli.prepare import (
    Prepare,
    TrainTokenizer,
    run_prepare,
    run_train_tokenizer,
)
from fastgpt.cli.sample import run_sample
from fastgpt.cli.train import Train, check_old_keys, keys_below, run_train, train_defaults
from fastgpt.interop.export import ExportConfig, export
from fastgpt.training.config import (
    SampleConfig,
    TrainConfig,
)
from fastgpt.training.distributed import World


def _marked(command: type, **marks: tuple[Any, ...]) -> None:
    """Tell tyro of fields whose class does not know of it. Whoever else reads the annotations finds
    the same types."""
    for name, of_field in marks.items():
        for mark in of_field:
            command.__annotations__[name] = Annotated[command.__annotations__[name], mark]


def _shown(metavar: str | None, default: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


_marked(
    SampleConfig,
    start=(_shown(None, "a line break"),),
    stop=(tyro.conf.UseAppendAction, _shown("TEXT", "none")),
    compile=(tyro.conf.FlagConversionOff,),
)
_marked(ExportConfig, output=(_shown("PATH", "hf, model.safetensors or nanogpt in out_dir"),))
_marked(
    PlotConfig,
    folders=(tyro.conf.Positional, _shown("[OUT_DIR ...]", "out")),
    output=(_shown("FILE.png", "curves.png in the folder; for several, here"),),
)

Command = Prepare | TrainTokenizer | Train | SampleConfig | ExportConfig | PlotConfig | DoctorConfig


def _parse(argv: list[str], defaults: Train) -> Command:
    command: Command = tyro.cli(
        Annotated[Prepare, tyro.conf.FlagConversionOff, tyro.conf.subcommand("prepare")]
        | Annotated[TrainTokenizer, tyro.conf.FlagConversionOff, tyro.conf.subcommand("tokenizer")]
        | Annotated[
            Train, tyro.conf.FlagConversionOff, tyro.conf.subcommand("train", default=defaults)
        ]
        | Annotated[SampleConfig, tyro.conf.FlagCreatePairsOff, tyro.conf.subcommand("sample")]
        | Annotated[ExportConfig, tyro.conf.subcommand("export")]
        | Annotated[PlotConfig, tyro.conf.subcommand("plot")]
        | Annotated[DoctorConfig, tyro.conf.subcommand("doctor")],
        prog="fastgpt",
        description="Train GPT-2-class models and sample from them.",
        args=argv,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return command


def _train_config(argv: list[str], first: Train) -> TrainConfig:
    """Defaults < preset < configuration file < command line.

    ``first`` is what ``argv`` gives on the plain defaults. It names preset and file; with these as
    the defaults ``argv`` is then read again.
    """
    second = _parse(argv, train_defaults(keys_below(first)))
    assert isinstance(second, Train)
    return TrainConfig(**second.keys())


def _export(config: ExportConfig, console: Console) -> None:
    exported = export(config)
    console.print(f"wrote {exported.path}")
    for note in exported.notes:
        console.print(f"note: {note}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line (``sys.argv`` by default); returns the exit code.

    0: done. 1: the run failed (diverged, out of memory, no connection, disk full). 2: a wrong
    argument, configuration, data set or checkpoint. 130: interrupted (training saves its state).
    """
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    argv = sys.argv[1:] if argv is None else argv
    try:
        world = World.from_environment()
        console = Console(markup=False, highlight=False, soft_wrap=True, quiet=not world.is_main)
        check_old_keys(argv)
        command = _parse(argv, Train())
        if isinstance(command, Train):
            run_train(_train_config(argv, command), world, console)
        elif isinstance(command, Prepare):
            run_prepare(command, console)
        elif isinstance(command, TrainTokenizer):
            run_train_tokenizer(command, console)
        elif isinstance(command, ExportConfig):
            _export(command, console)
        elif isinstance(command, PlotConfig):
            console.print(f"wrote {plot(command)}")
        elif isinstance(command, DoctorConfig):
            return doctor(console)
        else:
            run_sample(command, console, errors)
    except (FloatingPointError, ConnectionError, torch.OutOfMemoryError) as error:
        errors.print(f"error: {error}", style="bold red")
        return 1
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
        errors.print(f"error: {error}", style="bold red")
        return 2
    except OSError as error:
        errors.print(f"error: {error}", style="bold red")
        return 1
    except KeyboardInterrupt:
        errors.print("interrupted", style="bold red")
        return 130
    return 0
