"""The command line: precedence of keys, output, exit codes."""

import io
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import fastgpt
from fastgpt.cli import main as cli
from fastgpt.cli.arguments import normalized
from fastgpt.training.config import SampleConfig, TrainConfig
from fastgpt.training.distributed import World
from fastgpt.training.presets import PRESETS
from fastgpt.training.trainer import Trainer
from tests.tools.small_runs import TEXT, arguments, data_set, quiet, small_keys, state_of


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def parsed(*argv: str) -> TrainConfig:
    args = ["train", *argv]
    command = cli._parse(args, cli.Train())
    assert isinstance(command, cli.Train)
    return cli._train_config(args, command, quiet())


def small(**changes: Any) -> list[str]:
    return ["train", "--preset=gpt2", *arguments(small_keys(Path(), **changes))]


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
    # the command line wins even with the default
    assert parsed("--preset=char-cpu", "--n_layer=12", "--device=cuda").n_layer == 12


def test_presets_by_name() -> None:
    assert set(get_args(get_args(get_type_hints(cli.Train)["preset"])[0])) == set(PRESETS)
    for name, keys in PRESETS.items():
        expected = TrainConfig(**keys | {"batch_size": 3})
        assert parsed(name, "--batch_size=3") == parsed("--batch_size=3", name) == expected
        assert parsed(f"--preset={name}", "--batch_size=3") == expected
    train = {"eval_interval": 1000, "log_interval": 10, "wandb_run_name": "gpt2-124M"}
    assert parsed("train_gpt2").differences() == train
    tuned = parsed("finetune_shakespeare", "--device=cpu")
    assert (tuned.init_from, tuned.dataset, tuned.decay_lr) == ("gpt2-xl", "shakespeare", False)
    assert tuned.batch_size * tuned.gradient_accumulation_steps * tuned.max_iters == 640
    for size in ("medium", "large", "xl"):
        config = parsed(f"eval_gpt2_{size}")
        assert config.eval_only and config.init_from == f"gpt2-{size}"
    Path("char").write_text("n_layer = 5\n")  # a file of that name goes first
    assert parsed("char") == TrainConfig(n_layer=5)


def test_nanogpts_checkpoint_does_not_ask_for_torch_compile() -> None:
    """compile=True is nanoGPT's default, so only in a checkpoint of ours was it asked for."""
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
        other |= pair  # the two exclude each other
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
    assert normalized(argv, cli._COMMANDS) == [*argv[:-1], "--json=True"]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastgpt {fastgpt.__version__}\n"


def test_resume_goes_on_with_the_keys_of_the_checkpoint() -> None:
    data_set(Path())
    assert cli.main(small(log_interval=7)) == 0
    config = parsed("--init_from=resume", "--max_iters=30")
    keys = small_keys(Path(), log_interval=7, max_iters=30, init_from="resume")
    assert config == TrainConfig(**keys)
    assert parsed("--init_from=resume", "--preset=gpt2") == TrainConfig(init_from="resume")
    torch.save({"iter_num": 1, "config": {"pack": True}}, "out/iter-0000099.pt")  # an old name
    assert parsed("--init_from=resume").document_mask


def test_all_processes_take_the_keys_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """out_dir = 'out-' + str(time.time()) is another folder in each."""

    def gathered(self: World, item: Any) -> list[Any]:
        first = replace(item, out_dir="first") if isinstance(item, TrainConfig) else item
        return [first, item]

    data_set(Path())
    monkeypatch.setattr(World, "all_gather_object", gathered)
    assert cli.main(small(out_dir="second")) == 0
    assert Path("first/ckpt.pt").exists() and not Path("second").exists()


@pytest.mark.parametrize("of_nanogpt", [False, True])
def test_resume_without_the_dtype_of_the_checkpoint(
    of_nanogpt: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    data_set(Path())
    assert cli.main(small(max_iters=10)) == 0
    state = state_of(Path())
    state["config"]["dtype"] = "float16"  # of a GPU
    if of_nanogpt:
        del state["fastgpt"]
    torch.save(state, "out/iter-0000011.pt")
    resume = ["train", "--init_from=resume", "--max_iters=11"]
    capsys.readouterr()
    assert cli.main(resume) == 0
    said = "dtype = auto, as cpu has no float16, which the checkpoint names"
    assert capsys.readouterr().out.count(said) == 1
    assert cli.main([*resume, "--max_iters=12"]) == 0  # the new checkpoint has auto
    assert said not in capsys.readouterr().out
    for form in (["--dtype=float16"], ["--dtype", "float16"]):
        assert cli.main([*resume, *form]) == 2
        assert "dtype must be auto, float32 or bfloat16 on cpu" in capsys.readouterr().err
    Path("own.py").write_text("dtype = 'float16'")  # a file's is asked for, too
    assert cli.main(["train", "own.py", *small()[1:], "--init_from=resume"]) == 2
    assert "dtype must be auto, float32 or bfloat16 on cpu" in capsys.readouterr().err


def test_prepare_train_sample(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.txt").write_text(TEXT)
    assert cli.main(["prepare", "--input", "own.txt"]) == 0
    out = capsys.readouterr().out
    assert "prepared data/own: characters, vocabulary of 18, 8,388 tokens for training" in out
    assert "train on it: fastgpt train --dataset=own" in out

    assert cli.main(small(data_root="data", dataset="own")) == 0
    out = capsys.readouterr().out
    assert "keys that differ from the defaults: " in out and "dataset=own" in out
    assert "step 20: train loss" in out
    assert "bigram, counted on train.bin" in out and "bigram entropy of val.bin" in out
    sample, saved, last = out[out.index(" sample ") :].partition("\n")[2].rpartition("saved ")
    assert saved + last == "saved out/ckpt.pt. Write text with it: fastgpt sample\n"
    assert len(sample) > 300 and set(sample) <= set(TEXT)

    assert cli.main(["sample", "--num_samples=2", "--max_new_tokens=30", "--start=12"]) == 0
    samples = capsys.readouterr().out
    assert samples.count("12") >= 2 and len(samples) > 60


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_that_cannot_show_the_text(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printing changes no outcome: what a terminal cannot show is escaped."""
    Path("na\u00efve \u2603.txt").write_text(
        "na\u00efve caf\u00e9 \U0001f600\n" * 200, encoding="utf-8"
    )

    def printed(*argv: str) -> str:
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout", out)
            assert cli.main([*argv]) == 0
            out.flush()
        return out.buffer.getvalue().decode(encoding)

    name = "na\u00efve \u2603"
    assert r"\u2603" in printed("prepare", "--input", f"{name}.txt")
    text = printed(*small(data_root="data", dataset=name, max_iters=2, n_layer=1))
    assert "step 3" in text and r"\U0001f600" in text[text.index(" sample ") :]
    sample = ["sample", "--num_samples=2", "--max_new_tokens=60", "--start=\u00e9 \U0001f600"]
    assert r"\U0001f600" in printed(*sample)
    rows = [json.loads(line) for line in printed(*sample, "--json").splitlines()]
    assert [row["prompt"] for row in rows] == ["\u00e9 \U0001f600"] * 2
    errors = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr("sys.stderr", errors)
    assert cli.main(["prepare", "--input=absent \u2603"]) == 2


def test_a_run_stopped_before_its_first_evaluation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """sample and export take the newest iter-*.pt where there is no ckpt.pt, and say so."""
    data_set(Path())
    monkeypatch.setattr(World, "any", lambda self, value: True)  # stops behind its first update
    assert cli.main(small(eval_interval=1000)) == 130
    assert not Path("out/ckpt.pt").exists()
    capsys.readouterr()
    assert cli.main(["sample", "--num_samples=1", "--max_new_tokens=5", "--start=1"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("note: out has no ckpt.pt")
    assert captured.err.endswith("took out/iter-0000001.pt\n") and "took" not in captured.out
    assert cli.main(["export", "--to=nanogpt"]) == 0
    assert "note: out has no ckpt.pt" in capsys.readouterr().out
    assert torch.load("out/nanogpt/ckpt.pt")["iter_num"] == 1


def test_the_counted_bigram_is_a_fact_of_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    """It depends neither on the batches nor on the seed, and is not below its entropy."""
    draw = random.Random(0)
    data_set(Path(), "".join(draw.choice(["ab", "ac", "b ", "cab"]) for _ in range(2000)))
    shown = []
    for seed, eval_iters in ((1, 1), (2, 3)):
        assert cli.main(small(max_iters=2, seed=seed, eval_iters=eval_iters)) == 0
        shown.append(
            {
                cells[1].strip(): float(cells[-2])
                for cells in (line.split("│") for line in capsys.readouterr().out.splitlines())
                if len(cells) > 3
            }
        )
    assert shown[0].pop("gpt") != shown[1].pop("gpt") and shown[0] == shown[1]
    entropy = shown[0]["bigram entropy of val.bin"]
    assert entropy <= shown[0]["bigram, counted on train.bin"] < entropy + 0.02


def test_a_vocabulary_too_large_for_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (data_set(Path()) / "meta.pkl").unlink()

    def offline() -> None:
        raise ImportError("GPT-2's BPE needs tiktoken")

    monkeypatch.setattr("fastgpt.cli.train.GPT2Tokenizer", offline)
    assert cli.main(small(n_layer=1, max_iters=1)) == 0
    out = capsys.readouterr().out
    assert "No bigram table: 50304 x 50304 is too large." in out
    assert "no sample: GPT-2's BPE needs tiktoken" in out


def test_the_builtin_corpus_is_prepared_when_it_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(small(data_root="data", dataset="builtin", max_iters=2)) == 0
    assert "prepared data/builtin: " in capsys.readouterr().out
    assert cli.main(small(data_root="data", dataset="builtin", eval_only=True)) == 0
    out = capsys.readouterr().out
    assert "prepared" not in out and "bigram" not in out
    # as several files too
    shutil.rmtree("data")
    assert cli.main(["prepare", "--shard_tokens=1000000"]) == 0
    assert cli.main(small(data_root="data", dataset="builtin", eval_only=True)) == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "absent.py"], "there is no configuration file absent.py\n"),
        (
            ["train", "config/train_gpt2.py"],
            "train_gpt2.py; a built-in one has the name train_gpt2",
        ),
        (["train", "chars"], "a built-in one has the name char: fastgpt train char"),
        (["train", "folder"], "a configuration file is expected, but folder is a folder"),
        (["train", "--out_dir=file"], "out_dir must be a folder, but file is a file"),
        (["train", "--init_from=resume", "--out_dir=file"], "out_dir must be a folder, but file"),
        (["sample", "--out_dir=file"], "out_dir must be a folder, but file is a file"),
        (["export", "--to=nanogpt", "--out_dir=file"], "out_dir must be a folder, but file is"),
        (["export", "--to=nanogpt", "--output=file/x"], "output must lie in a folder, but file is"),
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
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (
            ["x"],
            "allowed: prepare, tokenizer, train, tune, sample, reward, rl, export, plot, ladder, "
            "translate, translate train, doctor",
        ),
        (["train", "--dropout=2"], "dropout must lie between 0 and 0.999, got 2.0"),
        (["train", "--init_from=resume"], "no ckpt.pt or iter-*.pt in out"),
        (["sample"], "there is no checkpoint out/ckpt.pt"),
        (["prepare", "--input=absent.txt"], "absent.txt does not exist"),
        (["prepare", "builtin", "--input=a.txt"], "a corpus or --input, not both"),
    ],
)
def test_user_errors_are_one_line(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    Path("cuda.py").write_text("device = 'cuda'\n")
    Path("folder").mkdir()
    Path("file").write_text("a text\n")
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "prepare"),
        (["train", "--n_layr=2"], "--n_layer"),
        (["train", "--compile=yes"], "invalid choice 'yes'"),
        (["train", "--batch_size=2.5"], "2.5"),
        (["train", "--preset=huge"], "huge"),
        (["sample", "--top_k=0"], "top_k must be at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_parse(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FloatingPointError("nan"), 1),
        (ConnectionError("offline"), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (OSError(28, "No space left on device", "out/x"), 1),
        (PermissionError(13, "Permission denied", "out"), 2),
        (ImportError("wandb"), 2),
        (KeyboardInterrupt(), 130),
        (RuntimeError("a bug"), None),  # shows its traceback
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(self: Trainer) -> None:
        raise error

    data_set(Path())
    monkeypatch.setattr(Trainer, "run", failing)
    if code is None:
        with pytest.raises(RuntimeError, match="a bug"):
            cli.main(small())
        return
    assert cli.main(small()) == code
    shown = str(error)
    if isinstance(error, OSError) and error.filename:
        shown = f"error: {error.strerror}: {error.filename}\n"
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["plot", "--help"], ["train", "--help"]])
def test_help_imports_little_besides_pytorch(argv: list[str]) -> None:
    """What takes long to import is imported by what needs it."""
    program = (
        "import sys, torch; before = set(sys.modules); from fastgpt.__main__ import main\n"
        f"try: main({argv})\n"
        "finally: print('modules:', *set(sys.modules) - before)"
    )
    command = [sys.executable, "-c", program]
    root = Path(cli.__file__).parents[2]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True).stdout
    modules = set(shown.rpartition("modules:")[2].split())
    assert "usage: fastgpt" in shown and "fastgpt.model" in modules
    heavy = """matplotlib wandb tensorboard transformers huggingface_hub tokenizers tiktoken
        datasets pyarrow sentencepiece safetensors triton sympy torch._dynamo torch._inductor
        torch.distributed.tensor torch.distributed.fsdp torch.distributed.checkpoint
        torch.utils.tensorboard""".split()
    assert modules & set(heavy) == set()


def test_the_module_runs_and_its_help_names_the_keys() -> None:
    command = [sys.executable, "-m", "fastgpt"]
    root = Path(cli.__file__).parents[2]
    helped = subprocess.run(
        [*command, "train", "--help"], capture_output=True, text=True, cwd=root, check=True
    )
    for word in ("CONFIG.py", "--preset", "--learning_rate", "model options", "--wandb_log"):
        assert word in helped.stdout
