"""``python -m fastgpt.tuning JSON``: an object with fields of ``GPTConfig`` and ``Workload``, and
``device``, ``seconds`` and ``only_missing`` of ``tune``. It needs no tyro; ``fastgpt train`` starts
it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields

import torch

from fastgpt._progress import progress_bar
from fastgpt.devices import resolve_device
from fastgpt.language_model import GPTConfig
from fastgpt.tuning.table import name_of, summary
from fastgpt.tuning.tuner import tune
from fastgpt.tuning.workload import Workload


def main(argv: Sequence[str]) -> int:
    keys = {"device": "cuda", "seconds": 180.0, "only_missing": False, **json.loads(argv[0])}
    shape = GPTConfig(**{f.name: keys.pop(f.name) for f in fields(GPTConfig) if f.name in keys})
    device, seconds, only_missing = (keys.pop(k) for k in ("device", "seconds", "only_missing"))
    if "dtype" in keys:
        keys["dtype"] = getattr(torch, keys["dtype"])
    work = Workload(shape, **keys)
    try:
        with progress_bar("tuning") as progress:
            table, left = tune(
                work,
                resolve_device(device),
                seconds=seconds,
                only_missing=only_missing,
                progress=progress,
            )
    except (ValueError, OSError, RuntimeError) as error:  # PyTorch's, too
        print(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return 1
    for line in table.lines.values():
        print(f"{name_of(line.key)}: {line.gain:.3f} times as fast, {line.config}")
    print(summary(table, left))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
