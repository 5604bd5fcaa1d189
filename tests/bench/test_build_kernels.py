"""python setup.py build_kernels: which kernels it compiles, when it recompiles, how it fails."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench import build_kernels
from bench._compile import kernel_cases
from bench._compile.static import Launch, compile_case, recorded
from bench._harness import cli
from fastgpt.kernels import configs
from fastgpt.kernels.configs import ANY, Key, dtype_class

ROOT = Path(__file__).resolve().parents[2]

CASES = """
import importlib
import sys
from functools import partial

import torch
from bench._compile.static import case_main


def launch(name, block):
    kernel = getattr(importlib.import_module(name), f"{name}_kernel")
    kernel[(1,)](torch.zeros(64), torch.zeros(64), 64, BLOCK=block, num_warps=1)


CASES = {"add": partial(launch, "add", 64), "hold": partial(launch, "hold", 8192)}

if __name__ == "__main__":
    sys.exit(case_main(CASES))
"""

SHARED = """
import triton
import triton.language as tl


@triton.jit
def plus_one(x):
    return x + 1
"""

ADD = """
import triton
import triton.language as tl
from shared import plus_one


@triton.jit
def add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, plus_one(x), mask=offs < n)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of cases with two kernels: one compiles cleanly, one spills."""
    folder = tmp_path_factory.mktemp("a $project")
    (folder / "cases.py").write_text(CASES)
    (folder / "shared.py").write_text(SHARED)
    (folder / "add.py").write_text(ADD)
    shutil.copy(ROOT / "tests" / "tools" / "toy_kernels.py", folder / "hold.py")
    return folder


@pytest.fixture
def run(project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """run(*arguments) → exit code, number of kernels compiled, output."""
    out = project / "build"
    monkeypatch.setattr(build_kernels, "CASES", project / "cases.py")
    monkeypatch.setattr(build_kernels, "KERNELS", project)
    monkeypatch.setattr(build_kernels, "OUT", out)

    def run(*arguments: str) -> tuple[int, int, str]:
        before = set(out.glob("cache/*.log"))
        status = build_kernels.main([*arguments, "--arch", "80"])
        printed = capfd.readouterr()
        return status, len(set(out.glob("cache/*.log")) - before), printed.out + printed.err

    return run


def manifest(project: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project / "build" / "manifest.json").read_text())
    return found


@pytest.mark.slow
def test_build_again_and_after_changes(project: Path, run) -> None:
    """Consecutive builds: each one finds the cache of those before it."""
    status, compiled, printed = run("--jobs", "2")
    assert (status, compiled) == (1, 2)
    assert "hold: hold_kernel on sm_80 (BLOCK=8192, num_warps=1, num_stages=3): spills" in printed
    assert "add_kernel on" not in printed
    add, hold = manifest(project)["cases"]
    assert (add["case"], add["capability"]) == ("add", 80)
    (kernel,) = add["kernels"]
    assert kernel["name"] == "add_kernel" and kernel["faults"] == []
    assert kernel["options"] == "BLOCK=64, num_warps=1, num_stages=3"
    assert kernel["registers"] > 0 and kernel["programs"] == 32
    assert kernel["instructions"]["mma"] == 0
    assert hold["kernels"][0]["spilled"] > 0

    status, compiled, printed = run()
    assert (status, compiled) == (1, 0)  # a cached fault is still a fault
    assert "spills" in printed

    assert run("--only", "a*")[:2] == (0, 0)
    assert [case["case"] for case in manifest(project)["cases"]] == ["add"]

    shared = project / "shared.py"  # add's kernel imports it
    shared.write_text(SHARED.replace("x + 1", "x + 2"))
    assert run()[:2] == (1, 1)
    shared.write_text(SHARED)
    assert run()[:2] == (1, 0)  # in the cache

    for log in project.glob("build/cache/*.log"):  # stopped before the log was written
        log.unlink()
    os.utime(shared)
    status, compiled, printed = run()
    assert (status, compiled) == (1, 2) and "spills" in printed

    cases = project / "cases.py"
    cases.write_text(CASES.replace("8192", "64"))
    assert run()[:2] == (0, 1)

    (project / "add.py").write_text(ADD.replace("plus_one(x)", "plus_two(x)"))
    status, compiled, printed = run()
    assert (status, compiled) == (1, 0)
    assert "NameError" in printed and "FAILED" in printed and "add" in printed


def test_wrong_arguments(run, monkeypatch: pytest.MonkeyPatch) -> None:
    status, _, printed = run("--only", "nothing*")
    assert status == 2 and "only must match a case, got 'nothing*'; there are add, hold" in printed
    status, _, printed = run("--jobs", "0")
    assert status == 2 and "jobs must be at least 1, got 0" in printed
    monkeypatch.setattr(shutil, "which", lambda *args, **options: None)
    status, _, printed = run()
    assert status == 2 and "pip install ninja" in printed


def test_a_case_that_launches_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="launched no kernel on sm_90"):
        compile_case(list, 90)


def test_the_command_of_setup_passes_arguments_and_exit_code_on() -> None:
    command = [sys.executable, "setup.py", "build_kernels", "--arch=90,100", "--only=nothing*"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "got 'nothing*'; there are" in run.stderr and "gelu" in run.stderr


# ------------------------------------------------------------------------------ the real kernels


def defined_kernels() -> set[str]:
    return {
        node.name
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }


@pytest.fixture(scope="module")
def recordings() -> dict[int, tuple[list[Launch], set[Key]]]:
    """Architecture → the launches of its cases, and the table entries that they took."""
    return {capability: recording(capability) for capability in (75, 80, 90, 100)}


def recording(capability: int) -> tuple[list[Launch], set[Key]]:
    taken = set()

    class Table(dict[Key, Any]):
        def __getitem__(self, key: Key) -> Any:
            taken.add(key)
            return super().__getitem__(key)

    configs.lookup.cache_clear()
    with (
        mock.patch.object(configs, "TABLE", Table(configs.TABLE)),
        recorded(capability) as launches,
    ):
        for case, architectures in build_kernels.edges(build_kernels.CASES).items():
            if capability in architectures:
                kernel_cases.CASES[case]()
    configs.lookup.cache_clear()
    return launches, taken


def test_cases_launch_every_kernel_and_ask_for_fused_multiply_adds(recordings) -> None:
    """Without ``enable_fp_fusion`` it would depend on Triton's version."""
    launches, _ = recordings[90]
    assert all(one.options["enable_fp_fusion"] for one in launches)
    assert {one.kernel.__name__ for one in launches} == defined_kernels()


def test_cases_take_every_line_of_the_table_on_every_architecture_it_is_for(recordings) -> None:
    """And no entry of the table is unreachable."""
    for key, config in configs.TABLE.items():
        if key.arch == "interpreter" or not isinstance(config, tuple):  # run by a library
            continue
        with_products = key.op == "attention" or key.kernel == "sum_parts"  # none on sm_75
        least = 80 if with_products else kernel_cases.LEAST_CAPABILITY.get(key.op, 0)
        own = [c for c in recordings if c >= least and is_chosen(key, c)]
        assert own, f"other lines hide {key}"
        for capability in own:
            assert key in recordings[capability][1], f"no case takes {key} on sm_{capability}"


def is_chosen(key: Key, capability: int) -> bool:
    """Whether a launch with the entry's own kernel, size and options takes it."""
    table = {one: one for one in configs.TABLE}
    dtypes = [d for d in (torch.bfloat16, torch.float32) if key.dtype in (ANY, dtype_class(d))]
    return key in [
        configs.first_entry(table, key.op, key.kernel, capability, dtype, key.size, key.options)
        for dtype in dtypes
    ]


def test_gpt2s_sizes_are_compiled_for_other_gpus_too() -> None:
    """All cases for one GPU of each class, unless the command line names architectures."""
    by_default = build_kernels.edges(build_kernels.CASES)
    assert by_default["gpt2"] == [89, 120]
    assert by_default["mlp"] == [75, 80, 90, 100] and by_default["fp8"] == [90, 100]
    assert by_default["attention-128"] == [80, 90, 100]
    every = sorted({arch for of_case in by_default.values() for arch in of_case})
    named = cli.options(build_kernels.Options(), ["--arch", *map(str, every)])
    assert list(named.arch) == every
    assert build_kernels.edges(build_kernels.CASES, [120, 80])["mlp"] == [80, 120]
    assert build_kernels.edges(build_kernels.CASES, [80, 90])["fp8"] == [90]
