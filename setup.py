"""Packages, and one command; the metadata stands in pyproject.toml.

The kernels live in ``kernels/`` and are installed as ``fastgpt.kernels``: the top-level name
``kernels`` belongs to another library.

    python setup.py build_kernels       # compile every kernel ahead of time, with no GPU
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Command, find_packages, setup

ROOT = Path(__file__).resolve().parent


class BuildKernels(Command):
    """``bench/build_kernels.py`` in the repository, installed or not."""

    description = "compile every kernel configuration ahead of time, with no GPU (needs ninja)"
    user_options = [
        ("arch=", "a", "compute capabilities, separated by commas (default: 75, 80, 90, 100)"),
        ("jobs=", "j", "processes at a time (default: one for each core)"),
        ("only=", "o", "cases whose names match this pattern, 'attention*' say"),
    ]

    def initialize_options(self) -> None:
        self.arch: str | None = None
        self.jobs: str | None = None
        self.only: str | None = None

    def finalize_options(self) -> None:
        pass  # the program checks its arguments

    def run(self) -> None:
        command = [sys.executable, str(ROOT / "bench" / "build_kernels.py")]
        if self.arch is not None:
            command += ["--arch", *self.arch.replace(",", " ").split()]
        if self.jobs is not None:
            command += ["--jobs", self.jobs]
        if self.only is not None:
            command += ["--only", self.only]
        path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        status = subprocess.run(command, env=environment).returncode
        if status:
            raise SystemExit(status)


# With the link fastgpt/kernels in place, an editable install is this folder on Python's path, and a
# clone named fastgpt in the working directory does not hide it. With a mapped folder it would be an
# import hook, which Python asks only after the working directory. Windows may have no link.
LINKED = (ROOT / "fastgpt" / "kernels").is_dir()

setup(
    packages=[*find_packages(include=["fastgpt", "fastgpt.*"]), "fastgpt.kernels"],
    package_dir={"": "."} if LINKED else {"fastgpt": "fastgpt", "fastgpt.kernels": "kernels"},
    cmdclass={"build_kernels": BuildKernels},
)
