"""The architecture, checked on the sources: imports run one way, heavy libraries load late."""

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.tools.small_runs import data_set, small_keys

ROOT = Path(__file__).resolve().parent.parent

# A folder, or a file named here, may import from its own line and from the lines above it.
RANKS = (
    "kernels/_checks kernels/_device_math kernels/_host kernels/_operators kernels/_tensors "
    "kernels/configs kernels/reference kernels/shipped_table kernels/tuned_table",
    "kernels/",
    "kernels/costs kernels/fused kernels/fused_rows",
    "fastgpt/_files fastgpt/_optional fastgpt/_progress fastgpt/cuda_graph fastgpt/devices "
    "fastgpt/timing",
    "fastgpt/tokenizer/ fastgpt/data/ fastgpt/assistant/__init__ "
    "fastgpt/assistant/template fastgpt/assistant/dialogues fastgpt/assistant/windows "
    "fastgpt/assistant/words",
    "fastgpt/ops",
    "fastgpt/generation fastgpt/language_model",
    "fastgpt/bigram fastgpt/blocks fastgpt/interop/huggingface fastgpt/model fastgpt/seq2seq",
    "fastgpt/__init__",
    "fastgpt/tuning/",
    "fastgpt/training/",
    "fastgpt/ladder fastgpt/step fastgpt/optimizer fastgpt/sampler fastgpt/interop/ "
    "fastgpt/translation/",
    "fastgpt/assistant/",
    "fastgpt/cli/",
    "fastgpt/__main__",
)

# Modules in kernels/ that only need torch, so that they can be imported without Triton.
TORCH_ALONE = {
    "_checks",
    "_operators",
    "_tensors",
    "chunked_loss",
    "reference",
    "torch_ops",
}
# Imported where they are used, by ``optional``.
LATE = {
    "datasets",
    "huggingface_hub",
    "matplotlib",
    "pyarrow",
    "sacrebleu",
    "safetensors",
    "sentencepiece",
    "tensorboard",
    "tiktoken",
    "tokenizers",
    "transformers",
    "wandb",
    "zstandard",
}
BY_TRANSFORMERS = {"huggingface_hub", "tokenizers"}  # installed with transformers


@dataclass(frozen=True)
class Import:
    module: str  # "torch.nn", or "fastgpt.kernels.gelu" for `from fastgpt.kernels import gelu`
    line: int
    at_import: bool  # outside of functions

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


def name_of(path: str) -> str:
    """``fastgpt/data/__init__.py`` → ``fastgpt.data``; ``kernels/`` → ``fastgpt.kernels``."""
    package = f"fastgpt/{path}" if path.startswith("kernels/") else path
    return package.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def rank_of(path: str) -> int:
    """Index of the line of ``RANKS`` with the longest prefix of ``path``."""
    best, rank = "", -1
    for i, line in enumerate(RANKS):
        for start in line.split():
            whole = start.endswith("/") and path.startswith(start) or path == f"{start}.py"
            if whole and len(start) > len(best):
                best, rank = start, i
    assert rank >= 0, f"{path} has no rank"
    return rank


PATHS = [
    str(path.relative_to(ROOT))
    for folder in ("fastgpt", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.is_relative_to(ROOT / "fastgpt" / "kernels")
]
SOURCES = {name_of(path): ROOT / path for path in PATHS}
RANK = {name_of(path): rank_of(path) for path in PATHS}


def imports(code: str, modules: set[str]) -> Iterator[Import]:
    """The imports of a source text. ``from a import b`` counts as ``a.b`` if that is one of
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


@functools.cache
def imports_of(module: str) -> list[Import]:
    return list(imports(SOURCES[module].read_text(), set(SOURCES)))


def everything() -> Iterator[tuple[str, Import, str]]:
    """(module, import, location for messages) of every import."""
    for module in SOURCES:
        for found in imports_of(module):
            yield module, found, f"{module}, line {found.line}: {found.module}"


def test_imports_run_one_way() -> None:
    for module, found, where in everything():
        assert found.package not in ("kernels", "bench", "tests"), where
        if found.package == "fastgpt":
            assert RANK[found.module] <= RANK[module], where


def test_no_modules_import_each_other() -> None:
    left = {
        module: {found.module for found in imports_of(module)} & SOURCES.keys() - {module}
        for module in SOURCES
    }
    while left:
        ready = [module for module, needs in left.items() if not needs & left.keys()]
        assert ready, f"these import each other: {sorted(left)}"
        for module in ready:
            del left[module]


def test_triton_and_optional_libraries_load_late() -> None:
    for module, found, where in everything():
        in_kernels, _, name = module.removeprefix("fastgpt.").rpartition(".")
        if found.package == "triton":
            asked = module == "fastgpt.cli.doctor" and not found.at_import  # only for its version
            assert asked or in_kernels == "kernels" and name not in TORCH_ALONE, where
        if found.package in ("tyro", "rich"):
            late = found.package == "rich" and not found.at_import
            assert module.startswith("fastgpt.cli") or late, where
        if found.package in LATE:  # after `optional` has checked for it
            assert not found.at_import and module.startswith("fastgpt.interop.transformers"), where
        # `fused` and the op files import Triton, so importing them imports it, too
        if found.module == "fastgpt.kernels.fused":
            late = module == "fastgpt.ops" and not found.at_import
            assert late or module == "fastgpt.kernels.fused_rows", where
        if found.module == "fastgpt.kernels.fused_rows":
            assert not found.at_import, where


def test_a_missing_library_is_in_the_extra_that_is_named() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    seen = set()
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Name(id="optional"),
                    args=[ast.Constant(value=str(library)), _, ast.Constant(value=str(extra))],
                ):
                    (listed,) = re.findall(rf"^{extra} = \[(.*?)\]", declared, re.M | re.S)
                    package = library.partition(".")[0]
                    required = "transformers" if package in BY_TRANSFORMERS else package
                    assert f'"{package}>' in listed or f'"{required}>' in listed, module
                    seen.add(package)
    assert seen == LATE - {"tensorboard", "wandb"}  # tested in test_log


def test_the_plain_ops_need_no_triton() -> None:
    for name in TORCH_ALONE:
        for found in imports_of(f"fastgpt.kernels.{name}"):
            allowed = found.package in ("torch", *sys.stdlib_module_names)
            assert allowed or found.module.removeprefix("fastgpt.kernels.") in TORCH_ALONE, name


def test_nothing_is_autotuned_at_run_time() -> None:
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(node, "attr", getattr(node, "id", ""))
            assert name != "autotune", f"{module}, line {getattr(node, 'lineno', '?')}"


# -- a machine without Triton, tyro and rich


def test_training_on_a_cpu_needs_no_triton_tyro_or_rich(tmp_path: Path) -> None:
    """Run two updates; then, with Triton, import every module except the command line's."""
    data_set(tmp_path)
    code = f"""
import importlib, json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tyro", "rich"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
sys.modules["triton"] = None  # every import of it fails
from fastgpt.__main__ import main
from fastgpt.training.config import TrainConfig
from fastgpt.training.trainer import Trainer
trainer = Trainer(TrainConfig(**json.loads({json.dumps(small_keys(tmp_path, max_iters=1))!r})))
trainer.run()
assert trainer.iter_num == 2
try:
    import fastgpt.kernels.fused
except ImportError:
    print("no triton here")
del sys.modules["triton"]
for module in {[name for name in SOURCES if not name.startswith("fastgpt.cli")]}:
    importlib.import_module(module)
sys.exit(main(["train"]))
"""
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 2, run.stderr
    assert run.stderr == "error: the command line needs tyro: pip install tyro\n"
    assert "iter 0: loss" in run.stdout and run.stdout.endswith("no triton here\n")
