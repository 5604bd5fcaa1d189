"""``python -m fastgpt.tuning JSON``, started by ``tune_before_training``. Works without tyro."""

import json
import sys
from collections.abc import Sequence

import torch

from fastgpt._files import without_errno
from fastgpt._progress import progress_bar
from fastgpt.devices import resolve_device
from fastgpt.language_model import GPTConfig
from fastgpt.tuning.table import summary
from fastgpt.tuning.tuner import tune
from fastgpt.tuning.workload import Workload


def main(argv: Sequence[str]) -> int:
    """Print a last line for the user. Returns the exit code: 0, or 1 after an error."""
    keys, device, seconds = json.loads(argv[0])
    keys |= {"config": GPTConfig(**keys["config"]), "dtype": getattr(torch, keys["dtype"])}
    try:
        with progress_bar("tuning") as progress:
            table, left = tune(
                Workload(**keys),
                resolve_device(device),
                seconds=seconds,
                only_missing=True,
                progress=progress,
            )
    except (ValueError, OSError, RuntimeError) as error:  # including PyTorch's
        print(f"{type(error).__name__}: {without_errno(error).strip().splitlines()[0]}")
        return 1
    print(summary(table, left))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
