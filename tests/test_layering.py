"""The architecture, read from the sources: imports run one way, heavy libraries load late."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_runs import data_set, small_keys

ROOT = Path(__file__).resolve().parent.parent

# module → modules of the project that it may import. Whoever adds a module adds a line.
_OP = {
    "fastgpt.kernels._checks",
    "fastgpt.kernels._common",
    "fastgpt.kernels._costs",
    "fastgpt.kernels._precision",
    "fastgpt.kernels.reference",
}
_DATA = {"fastgpt._progress", "fastgpt.tokenizer", "fastgpt.data"}
_MODEL = {"fastgpt.language_model", "fastgpt.model", "fastgpt.bigram"}
_RUN = {"fastgpt.config", "fastgpt.devices", "fastgpt.checkpoint", *_DATA, *_MODEL}
ALLOWED: dict[str, set[str]] = {
    "fastgpt.kernels._checks": set(),
    "fastgpt.kernels._common": {"fastgpt.kernels._precision"},
    "fastgpt.kernels._costs": set(),
    "fastgpt.kernels._precision": set(),
    "fastgpt.kernels.reference": {"fastgpt.kernels._checks"},
    "fastgpt.kernels.chunked_loss": {"fastgpt.kernels._costs", "fastgpt.kernels._precision"},
    "fastgpt.kernels.portable": {
        "fastgpt.kernels._checks",
        "fastgpt.kernels._precision",
        "fastgpt.kernels.chunked_loss",
        "fastgpt.kernels.reference",
    },
    "fastgpt.kernels.adamw": _OP,
    "fastgpt.kernels.embedding_kernels": {"fastgpt.kernels._common"},
    "fastgpt.kernels.embedding": {*_OP, "fastgpt.kernels.embedding_kernels"},
    "fastgpt.kernels.gelu": _OP,
    "fastgpt.kernels.layer_norm_kernels": {"fastgpt.kernels._common"},
    "fastgpt.kernels.layer_norm": {*_OP, "fastgpt.kernels.layer_norm_kernels"},
    "fastgpt.kernels.residual_layer_norm": {*_OP, "fastgpt.kernels.layer_norm"},
    "fastgpt.kernels.fp8_kernels": set(),
    "fastgpt.kernels.fp8_products": {
        "fastgpt.kernels._common",
        "fastgpt.kernels._costs",
        "fastgpt.kernels.fp8_kernels",
    },
    "fastgpt.kernels.linear_cross_entropy": {
        *_OP,
        "fastgpt.kernels.chunked_loss",
        "fastgpt.kernels.fp8_products",
    },
    "fastgpt.kernels.attention_kernels": {"fastgpt.kernels._common"},
    "fastgpt.kernels.attention_backward_kernels": {
        "fastgpt.kernels._common",
        "fastgpt.kernels.attention_kernels",
    },
    "fastgpt.kernels.attention_tiles": {"fastgpt.kernels._common"},
    "fastgpt.kernels.attention_launch": {
        "fastgpt.kernels._common",
        "fastgpt.kernels._costs",
        "fastgpt.kernels.attention_backward_kernels",
        "fastgpt.kernels.attention_kernels",
        "fastgpt.kernels.attention_tiles",
    },
    "fastgpt.kernels.attention": {*_OP, "fastgpt.kernels.attention_launch"},
    "fastgpt.kernels.attention_decode": _OP,
    "fastgpt.kernels.gemm_kernels": {"fastgpt.kernels._common"},
    "fastgpt.kernels.gemm": {
        "fastgpt.kernels._common",
        "fastgpt.kernels._costs",
        "fastgpt.kernels.gelu",
        "fastgpt.kernels.gemm_kernels",
    },
    "fastgpt.kernels.linear": {
        *_OP,
        "fastgpt.kernels.fp8_products",
        "fastgpt.kernels.gemm",
        "fastgpt.kernels.layer_norm",
    },
    "fastgpt.kernels.mlp": {*_OP, "fastgpt.kernels.gemm", "fastgpt.kernels.linear"},
    "fastgpt.kernels.fused": {
        "fastgpt.kernels._common",
        "fastgpt.kernels._costs",
        "fastgpt.kernels.adamw",
        "fastgpt.kernels.attention",
        "fastgpt.kernels.attention_decode",
        "fastgpt.kernels.embedding",
        "fastgpt.kernels.gelu",
        "fastgpt.kernels.layer_norm",
        "fastgpt.kernels.linear",
        "fastgpt.kernels.linear_cross_entropy",
        "fastgpt.kernels.mlp",
        "fastgpt.kernels.residual_layer_norm",
    },
    "fastgpt.ops": {
        "fastgpt.devices",
        "fastgpt.kernels._checks",
        "fastgpt.kernels.portable",
        "fastgpt.kernels.fused",
    },
    "fastgpt.generation": set(),
    "fastgpt.language_model": {"fastgpt.generation"},
    "fastgpt.huggingface": {"fastgpt.language_model"},
    "fastgpt.blocks": {"fastgpt.language_model", "fastgpt.ops"},
    "fastgpt.model": {
        "fastgpt._files",
        "fastgpt.blocks",
        "fastgpt.huggingface",
        "fastgpt.language_model",
        "fastgpt.ops",
    },
    "fastgpt.bigram": {"fastgpt.language_model"},
    "fastgpt.optimizer": {"fastgpt.language_model", "fastgpt.ops"},
    "fastgpt.parallel": set(),
    "fastgpt.fsdp": {"fastgpt.language_model", "fastgpt.model", "fastgpt.parallel"},
    "fastgpt.step": {"fastgpt.fsdp", "fastgpt.optimizer", "fastgpt.parallel"},
    "fastgpt._progress": set(),
    "fastgpt.config": {"fastgpt._files"},
    "fastgpt.config_file": {"fastgpt.config"},
    "fastgpt.devices": set(),
    "fastgpt.tokenizer_base": set(),
    "fastgpt.char_tokenizer": {"fastgpt._progress", "fastgpt.tokenizer_base"},
    "fastgpt.subword_tokenizers": {"fastgpt.tokenizer_base"},
    "fastgpt.tokenizer": {
        "fastgpt.char_tokenizer",
        "fastgpt.subword_tokenizers",
        "fastgpt.tokenizer_base",
    },
    "fastgpt._files": set(),
    "fastgpt.manifest": {"fastgpt._files"},
    "fastgpt.data": {"fastgpt._progress", "fastgpt.manifest"},
    "fastgpt.corpus": {*_DATA, "fastgpt.manifest", "fastgpt.readers"},
    "fastgpt.readers": set(),
    "fastgpt.sources": {"fastgpt.readers"},
    "fastgpt.shards": {"fastgpt._files", "fastgpt.manifest"},
    "fastgpt.tokenizer_training": {
        "fastgpt.sources",
        "fastgpt.subword_tokenizers",
        "fastgpt.tokenizer_base",
    },
    "fastgpt.data_commands": {
        "fastgpt.corpus",
        "fastgpt.prepare",
        "fastgpt.readers",
        "fastgpt.sources",
        "fastgpt.tokenizer",
        "fastgpt.tokenizer_training",
    },
    "fastgpt.prepare": {
        "fastgpt._files",
        "fastgpt.manifest",
        "fastgpt.shards",
        "fastgpt.sources",
        "fastgpt.tokenizer",
    },
    "fastgpt.sharded": {"fastgpt._files", "fastgpt.parallel"},
    "fastgpt.checkpoint": {"fastgpt._files", "fastgpt.sharded", "fastgpt.tokenizer", *_MODEL},
    "fastgpt.run_folder": {"fastgpt.checkpoint"},
    "fastgpt.start": {
        *_RUN,
        "fastgpt._files",
        "fastgpt.manifest",
        "fastgpt.parallel",
        "fastgpt.run_folder",
        "fastgpt.sharded",
    },
    "fastgpt.log": {"fastgpt._files", "fastgpt.config"},
    "fastgpt.meter": {"fastgpt._progress", "fastgpt.config"},
    "fastgpt.doctor": {"fastgpt.devices", "fastgpt.ops"},
    "fastgpt.plot": {"fastgpt.log"},
    "fastgpt.export": {
        "fastgpt.checkpoint",
        "fastgpt.huggingface",
        "fastgpt.subword_tokenizers",
        "fastgpt.tokenizer",
        *_MODEL,
    },
    "fastgpt.trainer": {
        *_RUN,
        "fastgpt._files",
        "fastgpt.fsdp",
        "fastgpt.log",
        "fastgpt.meter",
        "fastgpt.optimizer",
        "fastgpt.parallel",
        "fastgpt.run_folder",
        "fastgpt.sharded",
        "fastgpt.start",
        "fastgpt.step",
    },
    "fastgpt.sampler": {*_RUN, "fastgpt.generation"},
    "fastgpt.sample_command": {"fastgpt.config", "fastgpt.sampler"},
    "fastgpt.command_line": {
        *_RUN,
        "fastgpt.config_file",
        "fastgpt.corpus",
        "fastgpt.data_commands",
        "fastgpt.doctor",
        "fastgpt.export",
        "fastgpt.parallel",
        "fastgpt.plot",
        "fastgpt.run_folder",
        "fastgpt.sample_command",
        "fastgpt.sampler",
        "fastgpt.trainer",
    },
    "fastgpt.__main__": {"fastgpt.command_line"},
    "fastgpt": _MODEL,
}

# Of the command line, which alone needs tyro; progress bars apart it alone needs rich.
COMMAND_LINE = ("fastgpt.command_line", "fastgpt.data_commands", "fastgpt.sample_command")

# Libraries that the plain ops, hence a machine without Triton, do not need.
TORCH_ALONE = (
    "_checks",
    "_costs",
    "_precision",
    "chunked_loss",
    "reference",
    "portable",
)
# optional: imported where used
LATE = {
    "huggingface_hub",
    "matplotlib",
    "safetensors",
    "tensorboard",
    "tiktoken",
    "tokenizers",
    "transformers",
    "wandb",
}


@dataclass(frozen=True)
class Import:
    module: str  # "torch.nn", or "fastgpt.kernels.gelu" for `from fastgpt.kernels import gelu`
    line: int
    at_import: bool  # outside of functions

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def sources() -> dict[str, Path]:
    """Every module of the library: name → file."""
    found = {f"fastgpt.{path.stem}": path for path in (ROOT / "fastgpt").glob("*.py")}
    found["fastgpt"] = found.pop("fastgpt.__init__")
    kernels = {f"fastgpt.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    return found | kernels


SOURCES = sources()


def imports(code: str, modules: set[str]) -> Iterator[Import]:
    """The imports of a source text. ``from a import b`` counts as ``a.b`` where that is one of
    ``modules``, else as ``a``."""
    tree = ast.parse(code)
    late = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        or isinstance(outer, ast.If)
        and ast.unparse(outer.test) == "TYPE_CHECKING"
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else str(node.module) for name in full]
        else:
            continue
        yield from (Import(name, node.lineno, id(node) not in late) for name in names)


def imports_of(module: str) -> list[Import]:
    return list(imports(SOURCES[module].read_text(), set(SOURCES)))


MODULES = pytest.mark.parametrize("module", sorted(SOURCES))


def test_the_table_names_every_module() -> None:
    assert set(ALLOWED) == set(SOURCES)


def test_the_table_has_no_circle() -> None:
    below: dict[str, set[str]] = {}
    left = dict(ALLOWED)
    while left:
        ready = [module for module, needs in left.items() if needs <= below.keys()]
        assert ready, f"these import each other: {sorted(left)}"
        for module in ready:
            below[module] = left.pop(module)


@MODULES
def test_imports_run_one_way(module: str) -> None:
    for found in imports_of(module):
        if found.package == "fastgpt":
            assert found.module in ALLOWED[module], f"{module}, line {found.line}: {found.module}"


@MODULES
def test_kernels_know_no_model_and_the_tree_is_not_imported_by_its_other_name(module: str) -> None:
    for found in imports_of(module):
        assert found.package not in ("kernels", "bench", "tests"), f"{module}, line {found.line}"
        if module.startswith("fastgpt.kernels.") and found.package == "fastgpt":
            assert found.module.startswith("fastgpt.kernels"), f"{module}, line {found.line}"


@MODULES
def test_triton_and_optional_libraries_load_late(module: str) -> None:
    in_kernels, _, name = module.removeprefix("fastgpt.").rpartition(".")
    for found in imports_of(module):
        where = f"{module}, line {found.line}: {found.module}"
        if found.package == "triton":
            asked = module == "fastgpt.doctor" and not found.at_import  # for its version
            assert asked or in_kernels == "kernels" and name not in TORCH_ALONE, where
        if found.package in ("tyro", "rich"):
            late = found.package == "rich" and not found.at_import
            assert module in COMMAND_LINE or late, where
        if found.package in LATE:
            assert not found.at_import and in_kernels != "kernels", where
        # `fused` and the op files import Triton, so whoever imports them does
        if found.module == "fastgpt.kernels.fused":
            assert module == "fastgpt.ops" and not found.at_import, where


@pytest.mark.parametrize("name", TORCH_ALONE)
def test_the_plain_ops_need_no_triton(name: str) -> None:
    for found in imports_of(f"fastgpt.kernels.{name}"):
        allowed = found.package in ("torch", *sys.stdlib_module_names)
        assert allowed or found.module.removeprefix("fastgpt.kernels.") in TORCH_ALONE


@pytest.mark.parametrize(
    "name",
    ["tokenizer", "data", "config", "corpus", "_progress", "prepare", "tokenizer_training"],
)
def test_the_way_of_the_data_never_loads_the_model_by_its_own_imports(name: str) -> None:
    seen, todo = set[str](), [f"fastgpt.{name}"]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += [found.module for found in imports_of(module) if found.module in SOURCES]
    assert not seen & {"fastgpt", "fastgpt.language_model", "fastgpt.model", "fastgpt.ops"}


@MODULES
def test_nothing_is_autotuned_at_run_time(module: str) -> None:
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        name = getattr(node, "attr", getattr(node, "id", ""))
        assert name != "autotune", f"{module}, line {getattr(node, 'lineno', '?')}"


def test_how_imports_are_read() -> None:
    code = (
        "import triton.language as tl\n"
        "from fastgpt.kernels import fused, split\n"
        "from fastgpt.model import GPT\n"
        "if x:\n    import wandb\n"
        "def f():\n    import tiktoken\n"
    )
    found = {(i.module, i.line, i.at_import) for i in imports(code, set(SOURCES))}
    assert found == {
        ("triton.language", 1, True),
        ("fastgpt.kernels.fused", 2, True),
        ("fastgpt.kernels", 2, True),
        ("fastgpt.model", 3, True),
        ("wandb", 5, True),
        ("tiktoken", 7, False),
    }


# -- a machine without Triton


def test_only_the_command_line_needs_tyro_and_rich(tmp_path: Path) -> None:
    """Every other module is imported without them, and a run makes two updates."""
    data_set(tmp_path)
    code = f"""
import importlib, json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tyro", "rich"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
for module in {sorted(set(SOURCES) - set(COMMAND_LINE))}:
    importlib.import_module(module)
from fastgpt.__main__ import main
from fastgpt.config import TrainConfig
from fastgpt.trainer import Trainer
trainer = Trainer(TrainConfig(**json.loads({json.dumps(small_keys(tmp_path, max_iters=1))!r})))
trainer.run()
assert trainer.iter_num == 2
sys.exit(main(["train"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2, run.stderr
    assert run.stderr == "error: the command line needs tyro: pip install tyro\n"
    assert "iter 0: loss" in run.stdout


def test_training_on_a_cpu_needs_no_triton() -> None:
    code = """
import math, sys
sys.modules["triton"] = None  # every import of it fails
import torch
from fastgpt import GPT, GPTConfig
model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8))
idx = torch.arange(8).view(1, 8)
loss = model(idx, idx)[1]
loss.backward()
assert all(p.grad.isfinite().all() for p in model.parameters())
assert abs(loss.item() - math.log(16)) < 0.2
print("trained")
try:
    import fastgpt.kernels.fused
except ImportError:
    print("no triton here")
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert run.stdout.split("\n") == ["trained", "no triton here", ""], run.stderr
