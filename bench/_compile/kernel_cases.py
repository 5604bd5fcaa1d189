"""What ``build_kernels.py`` compiles: ``COMPILED``, case → function, of every ``bench_<op>.py``.

A case calls an op forward and backward on small CPU tensors, with every option that leads to
another launch configuration; only the launches are recorded. Sizes are as divisible by 16 as those
of real models.

    python -m bench._compile.kernel_cases gelu 90      # one case on one architecture, at once
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from bench._compile.static import case_main

CASES: dict[str, Callable[[], object]] = {}
LEAST_CAPABILITY: dict[str, int] = {}  # of cases that older architectures cannot run
for path in sorted(Path(__file__).parents[1].glob("bench_*.py")):
    module = importlib.import_module(f"bench.{path.stem}")
    CASES |= getattr(module, "COMPILED", {})
    LEAST_CAPABILITY |= getattr(module, "LEAST_CAPABILITY", {})

if __name__ == "__main__":
    sys.exit(case_main(CASES))
