"""Compiles every configuration in the kernels' launch tables ahead of time, without a GPU.

    python setup.py build_kernels                        # on all cores
    python setup.py build_kernels --arch=90 --only='attention*'

By default all cases are compiled for sm_75, sm_80, sm_90 and sm_100, one GPU of each class of the
launch tables, and GPT-2's sizes also for sm_89 and sm_120. (So far, the code for sm_86 has been the
same as for sm_89, with the same registers and shared memory.)

ninja runs one process for each case of ``bench_<op>.py`` and reruns it only after a kernel or this
tool has changed. Triton's cache in ``build/kernels/cache`` keeps unchanged configurations.
``build/kernels/manifest.json`` holds the registers, spills, shared memory, occupancy, matrix
instructions and asynchronous copies of every kernel configuration.

The exit code is 1, with a message that names the configuration, if a kernel spills registers, needs
more shared or tensor memory than available, or leaves the tensor cores idle.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from rich import box
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._compile.static import COPIES, MATRIX
from bench._harness import cli

_BENCH = Path(__file__).resolve().parent
_ROOT = _BENCH.parent
CASES = _BENCH / "_compile" / "kernel_cases.py"
OUT = _ROOT / "build" / "kernels"
KERNELS = _ROOT / "kernels"
_TOOL = [*(_BENCH / "_compile").glob("*.py"), *_BENCH.glob("bench_*.py")]


@dataclass
class Options:
    """Compile every kernel configuration ahead of time, without a GPU."""

    # Compute capabilities for all cases. Default: 75, 80, 90 and 100; for GPT-2's sizes also 89 and
    # 120.
    arch: tuple[Literal[75, 80, 86, 89, 90, 100, 120], ...] = ()
    # Parallel processes, 1 or more.
    jobs: int = os.cpu_count() or 1
    # Only cases whose names match this pattern, for example 'attention*'.
    only: str = "*"


_CLASSES, _OTHERS = (75, 80, 90, 100), (89, 120)


def edges(cases: Path, architectures: Iterable[int] = ()) -> dict[str, list[int]]:
    """Case → the architectures to compile it for, out of those that can run it. The file defines
    ``CASES``, name → function, and optionally ``LEAST_CAPABILITY``, name → the first architecture
    that can run it. By default, the case "gpt2" covers the GPUs besides one of each class."""
    spec = importlib.util.spec_from_file_location(cases.stem, cases)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    least = getattr(module, "LEAST_CAPABILITY", {})
    asked = sorted(set(architectures))
    found = {}
    for case in module.CASES:
        wanted = asked or (_OTHERS if case == "gpt2" else _CLASSES)
        found[case] = [c for c in wanted if c >= least.get(case, 0)]
    return {case: capabilities for case, capabilities in found.items() if capabilities}


# ----------------------------------------------------------------------------------------- ninja


def _ninja_file(cases: Path, out: Path, found: Mapping[str, list[int]]) -> str:
    program = _escaped(shlex.join([sys.executable, str(cases)]))
    inputs = " ".join(map(_escaped, sorted({cases, *_TOOL, *KERNELS.glob("*.py")})))
    # ninja reruns a command if its text changes, so it includes the versions.
    versions = _escaped(shlex.quote(f"triton {triton.__version__}, torch {torch.__version__}"))
    lines = [
        f"builddir = {_escaped(out)}",
        "rule compile",
        f"  command = {program} $case $arch {_escaped(shlex.quote(str(out)))} {versions}",
        "  description = $case",
    ]
    for case, capabilities in found.items():
        lines += [
            f"build {_escaped(out / f'{case}.json')}: compile | {inputs}",
            f"  case = {case}",
            f"  arch = {','.join(map(str, capabilities))}",
        ]
    return "\n".join(lines) + "\n"


def _escaped(text: Path | str) -> str:
    return re.sub(r"([$ :])", r"$\1", str(text))


def _ninja() -> str:
    """Path of ninja: from the Python package in this environment, else from the system."""
    program = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    program = program or shutil.which("ninja")
    if program is None:
        raise FileNotFoundError("ninja is not installed: pip install ninja")
    return program


def build(
    cases: Path, out: Path, *, arch: Iterable[int], jobs: int, only: str = "*"
) -> list[dict[str, Any]]:
    """Compile what is out of date; return the record of each case on each architecture.

    Args:
        cases: a file like ``kernel_cases.py``.
        out: folder for the records, ``build.ninja`` and ``manifest.json``.

    Raises:
        ValueError: ``only`` matches no case, or ``jobs`` is not positive.
        FileNotFoundError: ninja is not installed.
        CompilationError: a case failed; its output was passed on.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    every = edges(cases, arch)
    chosen = fnmatch.filter(every, only)
    if not chosen:
        names = ", ".join(sorted(every))
        raise ValueError(f"only must match a case, got {only!r}; there are {names}")
    out.mkdir(parents=True, exist_ok=True)
    script = out / "build.ninja"
    script.write_text(_ninja_file(cases, out, every))
    search = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    targets = [out / f"{case}.json" for case in chosen]
    status = subprocess.run(
        [_ninja(), "-f", str(script), "-j", str(jobs), "-k", "0", *map(str, targets)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1"},
    ).returncode
    if status:
        raise CompilationError(f"ninja failed with exit code {status}")
    records = [record for target in targets for record in json.loads(target.read_text())]
    manifest = {"triton": triton.__version__, "torch": torch.__version__, "cases": records}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n")
    return records


class CompilationError(RuntimeError):
    """A case could not be compiled."""


# ----------------------------------------------------------------------------------------- report


def table(records: Iterable[Mapping[str, Any]]) -> Table:
    """One row per kernel and architecture, with ranges over its configurations."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    out.add_column("kernel\n", overflow="fold")
    headers = "sm\n", "con-\nfigs", "registers\n", "spilled\nbytes", "shared\nKB", "programs\n/SM"
    for header in headers:
        out.add_column(header, justify="right", no_wrap=True)
    out.add_column("matrix, copies\n")
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        for kernel in record["kernels"]:
            groups.setdefault((kernel["name"], kernel["capability"]), []).append(kernel)
    for (name, capability), kernels in sorted(groups.items()):
        found = {kind for k in kernels for kind, n in k["instructions"].items() if n}
        out.add_row(
            name.strip("_").removesuffix("_kernel"),
            str(capability),
            str(len(kernels)),
            _range([k["registers"] for k in kernels]),
            str(max(k["spilled"] for k in kernels)),
            f"{max(k['shared_memory'] for k in kernels) / 1024:.0f}",
            _range([k["programs"] for k in kernels]),
            ", ".join(kind for kind in (*MATRIX, *COPIES) if kind in found) or "-",
        )
    return out


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0; 1 if a kernel is faulty or does not compile; 2 for a wrong argument."""
    try:
        o = cli.options(Options(), argv)
        records = build(CASES, OUT, arch=o.arch, jobs=o.jobs, only=o.only)
    except CompilationError as error:
        cli.failed(error)
        return 1
    except cli.USER_ERRORS as error:
        return cli.failed(error)
    console = Console(highlight=False)
    console.print(table(records))
    console.print(f"wrote {OUT / 'manifest.json'}", soft_wrap=True)
    faults = [
        f"{record['case']}: {fault}"
        for record in records
        for kernel in record["kernels"]
        for fault in kernel["faults"]
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
