"""Keys, presets, limits, and reading nanoGPT's configuration files."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastgpt.devices import is_native, peak_flops, resolve_device, resolve_dtype
from fastgpt.training.config import SampleConfig, TrainConfig
from fastgpt.training.config_file import read_config_file
from fastgpt.training.presets import PRESETS, automatic_keys

NANOGPT_DEFAULTS = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "backend": "nccl",
    "device": "cuda",
}


def test_nanogpts_keys_and_defaults() -> None:
    assert NANOGPT_DEFAULTS.items() <= asdict(TrainConfig()).items()


def test_presets_and_automatic_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for preset in PRESETS.values():
        TrainConfig(**preset)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert automatic_keys() == PRESETS["char"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    keys = automatic_keys()
    assert {k for k in keys if keys[k] != PRESETS["char-cpu"][k]} == {"max_iters", "lr_decay_iters"}


def test_values_and_differences() -> None:
    assert TrainConfig(n_layer=3, device="cuda").differences() == {"n_layer": 3}
    assert TrainConfig(learning_rate=3e-5, decay_lr=False).min_lr == 6e-5  # unused without decay
    value = TrainConfig(learning_rate=1).learning_rate  # an int is accepted for a float
    assert value == 1.0 and isinstance(value, float)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"compile": "yes"}, TypeError, "compile must be True or False, got 'yes'"),
        ({"n_layer": True}, TypeError, "n_layer must be an integer, got True"),
        ({"learning_rate": "1e-3"}, TypeError, "learning_rate must be a number, got '1e-3'"),
        ({"out_dir": 3}, TypeError, "out_dir must be a string, got 3"),
        ({"dtype": "fp16"}, ValueError, "dtype must be one of auto, float32, .* got 'fp16'"),
        ({"init_from": "gpt3"}, ValueError, "init_from must be one of scratch, .* got 'gpt3'"),
        ({"model": "bigram", "init_from": "gpt2"}, ValueError, "init_from must be scratch or"),
        ({"fp8": "mlp"}, ValueError, "fp8 must be one of none, head, got 'mlp'"),
        (
            {"fp8": "head", "model": "bigram"},
            ValueError,
            "fp8 must be none with model='bigram', got 'head'",
        ),
        ({"n_head": 5}, ValueError, "n_embd=768 with n_head=5"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"dropout": 1.0}, ValueError, "dropout must lie between 0 and 0.999, got 1.0"),
        ({"learning_rate": 3e-5}, ValueError, "min_lr=6e-05 with learning_rate=3e-05"),
    ],
)
def test_bad_values_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 1.1}, "top_p must lie between 0 and 1, got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must lie between 0.01 and 100, got 0.0"),
        ({"stop": ("a", "")}, "stop must hold texts of at least one character, got ''"),
        ({"stop": "a"}, "stop must be a tuple of strings, got"),
        ({"stop": ["a"]}, "stop must be a tuple of strings, got"),
        ({"stop": ("a", 1)}, "stop must be a tuple of strings, got"),
        ({"interactive": True, "lines": True}, "give --interactive or --lines, not both"),
        ({"start": ""}, "start must hold at least one character"),
        ({"init_from": "scratch"}, "init_from must be one of resume, gpt2"),
    ],
)
def test_bad_sampling_values_are_named(changes: dict[str, Any], message: str) -> None:
    error = TypeError if "tuple" in message else ValueError
    with pytest.raises(error, match=message):
        SampleConfig(**changes)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.py"
    path.write_text(text)
    return path


def test_config_file(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '''"""GPT-2 on eight cards' worth of batches."""
# a comment
wandb_log = True
wandb_project = 'owt'  # another
gradient_accumulation_steps = 5 * 8
batch_size = 3 * (2 + 2)
max_iters = 12*1024
lr_decay_iters = max_iters
learning_rate = 1e-3
min_lr = learning_rate / 10
weight_decay = +1
dropout = -(-0.25)
warmup_iters = max_iters // 100 % 50 - 2
''',
    )
    assert read_config_file(path) == {
        "wandb_log": True,
        "wandb_project": "owt",
        "gradient_accumulation_steps": 40,
        "batch_size": 12,
        "max_iters": 12288,
        "lr_decay_iters": 12288,
        "learning_rate": 1e-3,
        "min_lr": 1e-4,
        "weight_decay": 1.0,
        "dropout": 0.25,
        "warmup_iters": 20,
    }
    path.write_bytes(b"\xef\xbb\xbfn_layer = 1\r\nbias = True\r\n")  # a byte order mark
    assert read_config_file(path) == {"n_layer": 1, "bias": True}


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("import os", ValueError, "'import os' is not read; allowed: key = "),
        ("from time import time", ValueError, "is not read"),
        ("out_dir = str(time.time())", ValueError, r"'time.time\(\)' is not read"),
        ("import time\nout_dir = time.ctime()", ValueError, "is not read"),
        ("import time\nout_dir = time.time()", TypeError, "out_dir must be a string, got 1"),
        ("out_dir = 'a' + 1", ValueError, "'1' is not a string"),
        ("out_dir = 1 + 'a'", ValueError, "\"'a'\" is not a number"),
        ("out_dir = str(1, 2)", ValueError, "is not read"),
        ("n_layer = int('6')", ValueError, r"\"int\('6'\)\" is not read; allowed: key = "),
        ("out_dir = open('made', 'w').name", ValueError, "is not read"),
        ("n_layer = n_head", ValueError, "'n_head' is not read"),
        ("n_layer = 'a' * 3", ValueError, "\"'a'\" is not a number"),
        ("n_layer = True + 1", ValueError, "'True' is not a number"),
        ("n_layer = 6 / 0", ValueError, "division by zero"),
        (f"min_lr = {10**200} * {10**200}", ValueError, "too large"),
        ("n_layer = n_head = 6", ValueError, "is not read"),
        ("if True:\n    n_layer = 6", ValueError, "'if True:' is not read"),
        ("n_layer = = 6", ValueError, "not a Python assignment"),
        ("n_layr = 6", ValueError, "unknown key 'n_layr': did you mean 'n_layer'?"),
        ("pack = True", ValueError, "unknown key 'pack': it is called 'document_mask' now"),
        ("zzz = 6", ValueError, "unknown key 'zzz'; allowed: always_save_checkpoint, "),
        ("n_layer = 6.5", TypeError, "n_layer must be an integer, got 6.5"),
        ("compile = 'yes'", TypeError, "compile must be True or False, got 'yes'"),
    ],
)
def test_bad_lines_are_named_and_not_executed(
    tmp_path: Path,
    line: str,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, f"batch_size = 8\n{line}\n")
    with pytest.raises(error, match=f"config.py:{2 + line.count(chr(10) + 'out')}: .*{message}"):
        read_config_file(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def _recursion_as_at_the_start() -> Iterator[None]:
    """Inductor doubles the recursion limit for the rest of the process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("_recursion_as_at_the_start")
@pytest.mark.parametrize("operators", [1500, 5000, 200_000])
def test_too_long_an_expression(tmp_path: Path, operators: int) -> None:
    if operators > 5000 and sys.version_info < (3, 11):
        pytest.skip("Python 3.10's own parser overflows the stack and kills the process")
    for expression in ("+".join(["1"] * operators), "-" * operators + "1"):
        path = written(tmp_path, f"batch_size = {expression}\n")
        with pytest.raises(ValueError, match="config.py:.* too many operators"):
            read_config_file(path)


def test_a_name_by_the_time_as_nanogpt_gives_one(tmp_path: Path) -> None:
    text = (
        "import time\nbatch_size = 2\nout_dir = 'ft-' + str(time.time()) + '-' + str(batch_size)\n"
    )
    before = time.time()
    name = read_config_file(written(tmp_path, text))["out_dir"]
    assert before <= float(name.removeprefix("ft-").removesuffix("-2")) <= time.time()


def test_config_file_missing_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no configuration file .*absent.py$"):
        read_config_file(tmp_path / "absent.py")
    built_in = "config/eval_gpt2_xl.py; there is a built-in one, .*: fastgpt train eval_gpt2_xl$"
    with pytest.raises(FileNotFoundError, match=built_in):
        read_config_file("config/eval_gpt2_xl.py")
    path = tmp_path / "binary.py"
    path.write_bytes(b"n_layer = \xff")
    with pytest.raises(ValueError, match="binary.py: not UTF-8 text"):
        read_config_file(path)
    path.write_bytes(b"n_layer = 1\x00")
    with pytest.raises(ValueError, match="binary.py"):
        read_config_file(path)


def test_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) == torch.float32
    assert resolve_dtype("bfloat16", cpu) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be auto, float32 or bfloat16 on cpu"):
        resolve_dtype("float16", cpu)
    with pytest.raises(ValueError, match="device must be one that this machine has .* got 'tpu'"):
        resolve_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == cpu
    with pytest.raises(ValueError, match="got 'cuda'"):
        resolve_device("cuda")


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float16), (8, torch.bfloat16)])
def test_dtype_of_a_gpu(major: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch reports bfloat16 as supported on a T4 (7.5), which only emulates it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    facts = SimpleNamespace(major=major, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    device = torch.device("cuda")
    assert resolve_dtype("auto", device) == dtype
    assert is_native("bfloat16", device) == (dtype == torch.bfloat16)
    assert is_native("float16", device) and not is_native("float16", torch.device("cpu"))


@pytest.mark.parametrize(
    "gpu, tflops",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3080 Laptop GPU", None),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_gpu(gpu: str, tflops: float | None) -> None:
    assert peak_flops(gpu) == (None if tflops is None else 1e12 * tflops)
