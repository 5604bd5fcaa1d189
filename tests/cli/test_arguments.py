"""Command-line arguments: precedence of keys, rejected input, help."""

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import fastgpt
from fastgpt.cli import main as cli
from fastgpt.cli.arguments import normalized
from fastgpt.cli.ladder import LadderConfig
from fastgpt.training.config import SampleConfig, TrainConfig
from fastgpt.training.presets import PRESETS
from fastgpt.translation.config import TranslationConfig
from tests.tools.small_runs import arguments, data_set, quiet, small_keys


def parsed(*argv: str) -> TrainConfig:
    args = ["train", *argv]
    command = cli._parse(args, cli.Train())
    assert isinstance(command, cli.Train)
    return cli._train_config(args, command, quiet())


def test_defaults_preset_file_command_line() -> None:
    Path("config.py").write_text("n_layer = 5\nbatch_size = 7\nlearning_rate = 1\n")
    assert parsed("--preset=gpt2") == TrainConfig()
    assert parsed("--preset=char") == TrainConfig(**PRESETS["char"])
    assert parsed("config.py") == TrainConfig(n_layer=5, batch_size=7, learning_rate=1.0)
    changed = PRESETS["char-cpu"] | {"n_layer": 5, "batch_size": 9, "learning_rate": 1.0}
    for argv in (
        ["config.py", "--preset=char-cpu", "--batch_size=9"],
        ["--batch_size", "9", "config.py", "--preset", "char-cpu"],
        ["--preset=char-cpu", "--batch-size=9", "config.py"],
    ):
        assert parsed(*argv) == TrainConfig(**changed)
    # the command line wins even if it gives the default value
    assert parsed("--preset=char-cpu", "--n_layer=12", "--device=cuda").n_layer == 12


def test_presets_by_name() -> None:
    for name, keys in PRESETS.items():
        assert parsed(name, "--batch_size=3") == TrainConfig(**keys | {"batch_size": 3})
    expected = parsed("char", "--batch_size=3")
    assert parsed("--batch_size=3", "char") == parsed("--preset=char", "--batch_size=3") == expected
    Path("char").write_text("n_layer = 5\n")  # a file of that name wins over the preset
    assert parsed("char") == TrainConfig(n_layer=5)


def test_nanogpts_checkpoint_does_not_ask_for_torch_compile() -> None:
    """compile=True is nanoGPT's default, so only in our own checkpoints is it the user's choice."""
    keys = {"compile": True, "n_layer": 3}
    state = {"iter_num": 1, "config": keys}
    Path("out").mkdir()
    torch.save(state, "out/ckpt.pt")
    resumed = parsed("--init_from=resume")
    assert (resumed.n_layer, resumed.compile) == (3, False)
    torch.save({**state, "fastgpt": {"model": "gpt"}}, "out/ckpt.pt")
    assert parsed("--init_from=resume").compile


def test_no_preset_and_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    short = PRESETS["char-cpu"] | {"max_iters": 1000, "lr_decay_iters": 1000}
    assert parsed() == TrainConfig(**short)
    assert parsed("--n_embd=64").n_embd == 64
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parsed() == TrainConfig(**PRESETS["char"])


def test_every_key_is_an_option() -> None:
    other = {
        key: {bool: not value, int: 8, float: 0.25, str: "x"}[type(value)]
        for key, value in vars(TrainConfig()).items()
    }
    other |= {"dtype": "float16", "init_from": "resume", "parallel": "fsdp"}
    for pair in ({"model": "bigram", "fp8": "none"}, {"model": "gpt", "fp8": "head"}):
        other |= pair  # mutually exclusive
        assert vars(parsed("--preset=gpt2", *arguments(other))) == other


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--recompute"], True),
        (["--recompute", "--batch_size=2"], True),
        (["--recompute", "config.py"], True),
        (["--recompute=true"], True),
        (["--recompute", "True"], True),
        (["--recompute=False"], False),
        (["--recompute", "false"], False),
    ],
)
def test_both_forms_of_a_boolean(argv: list[str], value: bool) -> None:
    Path("config.py").write_text("n_layer = 5\n")
    assert parsed("--preset=gpt2", *argv).recompute is value
    keys = {key for key, kind in get_type_hints(SampleConfig).items() if kind is bool}
    assert keys == {"lines", "interactive", "chat", "json", "compile"}
    for key in keys:
        args = ["sample", *(word.replace("recompute", key) for word in argv if "=2" not in word)]
        args = [word for word in args if word != "config.py"]
        assert getattr(cli._parse(args, cli.Train()), key) is value


def test_values_that_look_like_options() -> None:
    argv = ["sample", "--start", "top_k=3", "--stop", "--json", "--json"]
    assert normalized(argv, {"sample": SampleConfig}) == [*argv[:-1], "--json=True"]
    argv = ["ladder", "--rungs", "bigram", "heads", "--json", "--rungs"]
    expected = LadderConfig(json=True)  # the last --rungs has none
    assert cli._parse(argv, cli.Train()) == expected
    argv = ["translate", "train", "numbers", "--learning_rate=None", "--seed", "1_337"]
    assert cli._parse(argv, cli.Train()) == TranslationConfig(task="numbers")


def test_resume_goes_on_with_the_keys_of_the_checkpoint() -> None:
    data_set(Path())
    assert cli.main(["train", "--preset=gpt2", *arguments(small_keys(Path(), log_interval=7))]) == 0
    config = parsed("--init_from=resume", "--max_iters=30")
    keys = small_keys(Path(), log_interval=7, max_iters=30, init_from="resume")
    assert config == TrainConfig(**keys)
    assert parsed("--init_from=resume", "--preset=gpt2") == TrainConfig(init_from="resume")
    torch.save({"iter_num": 1, "config": {"pack": True}}, "out/iter-0000099.pt")  # its old name
    assert parsed("--init_from=resume").document_mask


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "absent.py"], "there is no configuration file absent.py"),
        (
            ["train", "config/train_gpt2.py"],
            "train_gpt2.py; there is a built-in one, train_gpt2",
        ),
        (["train", "chars"], "there is a built-in one, char: fastgpt train char"),
        (["train", "folder"], "a configuration file is expected, but folder is a folder"),
        (["train", "--out_dir=file"], "out_dir must be a folder, but file is a file"),
        (["train", "--init_from=resume", "--out_dir=file"], "out_dir must be a folder, but file"),
        (["sample", "--out_dir=file"], "out_dir must be a folder, but file is a file"),
        (["export", "--to=nanogpt", "--out_dir=file"], "out_dir must be a folder, but file is"),
        (["export", "--to=nanogpt", "--output=file/x"], "output must lie in a folder, but file is"),
        (["plot", "out", "--output=file/x.png"], "output must lie in a folder, but file is a file"),
        (["prepare", "--input=file", "--out_dir=file/x"], "out_dir must be a folder, but file is"),
        (["train", "--preset=gpt2", "--device=cpu"], "train.bin is not a file"),
        (["train", "--preset=gpt2", "--n_head=7"], "n_embd=768 with n_head=7"),
        (["train", "cuda.py"], "this machine has (cpu), got 'cuda': --device=cpu runs here"),
        (["train", "--device=cuda:1"], "got 'cuda:1': --device=cpu runs here"),
        (["sample", "--device=cuda"], "got 'cuda': --device=cpu runs here"),
        (["train", "--pack=True"], "unknown option --pack: it is called --document_mask now"),
        (["train", "--resume"], "did you mean --init_from=resume?"),
        (["train", "dataset=shake"], "dataset=shake needs two dashes in front: --dataset=shake"),
        (["sample", "--json", "top_k=3"], "top_k=3 needs two dashes in front: --top_k=3"),
        (["sample", "-top-k=3"], "-top-k=3 needs two dashes in front: --top-k=3"),
        (["train", "--n-layr=2"], "unknown option --n_layr: did you mean --n_layer?"),
        (["train", "--modl", "gpt"], "unknown option --modl: did you mean --model?"),
        (["doctor", "--verbose"], "unknown option --verbose; --help shows the options"),
        (["train", "--config_fil=x.py"], "unknown option --config_fil; --help shows the options"),
        (["train", "--batch_size"], "--batch_size needs a value"),
        (["train", "--compile=yes"], "compile must be True or False, got 'yes'"),
        (["export", "--to", "gguf"], "to must be one of hf, safetensors, nanogpt, got 'gguf'"),
        (["train", "--dtype=half"], "dtype must be one of auto, float32, bfloat16, float16, got"),
        (["prepare", "--input="], "input must be a path, got ''"),
        (["prepare", "--hf_dataset="], "hf_dataset must be the name of a data set, got ''"),
        (["train", "--init_from="], "init_from must be one of scratch, resume, gpt2"),
        (["plot", "file"], "folders must be those of runs, but file is a file"),
        (["translate", "a", "--model=file"], "the model must be a folder, but file is a file"),
        (
            ["reward", "--init_from=file", "--dataset=file"],
            "init_from must be the folder of a run, but file is a file",
        ),
        (
            ["tokenizer", "train", "--input=file", "--out_dir=x", "--vocab_size=20_000_000"],
            "vocab_size must lie between 1 and 16777216, got 20000000",
        ),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (
            ["x"],
            "allowed: prepare, tokenizer, train, tune, sample, reward, rl, export, plot, ladder, "
            "translate, translate train, doctor",
        ),
        (["train", "--dropout=2"], "dropout must lie between 0 and 0.999, got 2.0"),
        (["train", "--batch_size=2.5"], "batch_size must be an integer, got '2.5'"),
        (["prepare", "--val_share", ""], "val_share must be a number, got ''"),
        (["sample", "--top_k=0"], "top_k must be at least 1, got 0"),
        (["sample", "--temperature=1e400"], "temperature must be at least 0 and finite, got inf"),
        (["sample", "--chat", "--lines"], "give --chat or --lines, not both"),
        (["translate", "train"], "give one parallel text"),
        (["tune", "--seconds=nan"], "seconds must be at least 0 and finite, got nan"),
        (["train", "--init_from=resume"], "no ckpt.pt or iter-*.pt in out"),
        (["sample"], "there is no checkpoint out/ckpt.pt"),
        (["prepare", "--input=absent.txt"], "absent.txt does not exist"),
        (["prepare", "builtin", "--input=a.txt"], "a corpus or --input, not both"),
    ],
)
def test_user_errors_are_one_line(
    argv: list[str], message: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    Path("cuda.py").write_text("device = 'cuda'\n")
    Path("folder").mkdir()
    Path("file").write_text("a text\n")
    assert message in refused(*argv)


@pytest.mark.parametrize("options", [TrainConfig, *(kind for kind, _ in cli._COMMANDS.values())])
def test_every_number_has_limits(options: type) -> None:
    lacking = {f.name: "x" for f in fields(options) if f.default is f.default_factory}
    if options is TranslationConfig:
        lacking["task"] = "numbers"
    kinds = get_type_hints(options)
    for kind, wrong in ((int, (-1, 2**64)), (float, (math.nan, math.inf, -1.0))):
        for name in (name for name, found in kinds.items() if found in (kind, kind | None)):
            for value in wrong:
                with pytest.raises(ValueError, match=f"^{name} must .*, got {value}"):
                    options(**lacking | {name: value})


def test_a_cpu_without_memory_is_one_line(refused: Callable[..., str]) -> None:
    keys = small_keys(Path(), batch_size=2**48)  # more than any address space
    data_set(Path())
    assert "out of memory" in refused("train", "--preset=gpt2", *arguments(keys), code=1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "prepare"),
        (["train", "--preset=huge"], "huge"),
    ],
)
def test_arguments_that_do_not_parse(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_version_and_help_import_little_besides_pytorch() -> None:
    """Slow imports happen only where they are needed."""
    program = """
import sys, torch
before = set(sys.modules)
from fastgpt.__main__ import main
main(["--version"])
for argv in ["--help"], ["plot", "--help"], ["sample", "--help"], ["train", "--help"]:
    try: main(argv)
    except SystemExit as stopped: assert stopped.code == 0
print("modules:", *set(sys.modules) - before)
"""
    command = [sys.executable, "-c", program]
    root = Path(cli.__file__).parents[2]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout
    modules = set(shown.rpartition("modules:")[2].split())
    assert shown.startswith(f"fastgpt {fastgpt.__version__}\n") and "fastgpt.model" in modules
    words = "CONFIG.py", "--learning_rate", "Number of samples", "model options", "--wandb_log"
    assert all(word in shown for word in ("usage: fastgpt", *words))
    heavy = """matplotlib wandb tensorboard transformers huggingface_hub tokenizers tiktoken
        datasets pyarrow sentencepiece safetensors triton sympy torch._dynamo torch._inductor
        torch.distributed.tensor torch.distributed.fsdp torch.distributed.checkpoint
        torch.utils.tensorboard fastgpt.kernels.fused""".split()
    assert modules & set(heavy) == set()
