"""Looks for better lines of the launch tables.

    python bench/sweep.py attention                 # on a GPU: compiled, checked, measured
    python bench/sweep.py gemm --arch 100           # without one: compiled
    python bench/sweep.py attention layer_norm --only '*head size 64*' --minutes 5

1. Every candidate in the neighbourhood of a line is compiled ahead of time, on all cores. One that
   spills a register, asks for more shared memory than there is, multiplies without the tensor
   cores or does not compile is rejected.
2. On a GPU, what is left takes the line's place in its table for the time of a call of the host
   function. Its results have to equal the present line's up to rounding, at every size.
3. All are timed in interleaved rounds, on inputs that no cache holds, beside the present line,
   which is timed twice: the difference is the noise. Those within 15% of the best get more rounds.
   A line serves all its sizes: what counts is the geometric mean of the times over the present
   line's.

Printed is each line as it would stand in the table, with its figures. It differs from the present
one only where that is slower by more than the noise and 1%.
"""

import argparse
import fnmatch
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._compile.multiprocessor import ARCHITECTURES
from bench._harness import cli, machine
from bench._harness.cli import failure_of, write_json
from bench._roofline.ceilings import Ceilings
from bench._sweep.compile import Static, Task, compile_all, fitted
from bench._sweep.contest import comment, gpu_timer, measured, verdict
from bench._sweep.line import Line, Tile
from bench._sweep.tables import OPS, lines
from fastgpt.kernels import _host


def static_table(line: Line, found: dict[Tile, Static]) -> Table:
    """Those without a fault."""
    title = f"{line.name}: {line.text(line.current)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("candidate\n", no_wrap=True)
    for header in ("registers\n", "shared\nKB", "programs\n/SM"):
        table.add_column(header, justify="right", no_wrap=True)
    good = [(tile, one) for tile, one in found.items() if one.fault is None]
    for tile, one in good:
        name = "cuBLAS" if tile is None else str(tile)
        figures = (str(one.registers), f"{one.shared_memory / 1024:.0f}", str(one.programs))
        table.add_row(
            f"{name} (present)" if tile == line.current else name,
            *("---" if tile is None else figures),
        )
    table.caption = f"{len(found) - len(good)} of {len(found)} rejected"
    return table


def sweep_line(
    op: str,
    line: Line,
    capability: int,
    dtype: torch.dtype,
    jobs: int,
    ceilings: Ceilings | None,
    console: Console,
) -> dict[str, Any]:
    """Compile and, given the ceilings of a GPU, measure; the record."""
    console.print(f"{line.name}: compiling {len(line.candidates)} candidates")
    tiles = [line.current, *line.candidates]
    keep = ceilings is not None
    tasks = [Task(op, line.name, tile, capability, dtype, keep) for tile in tiles]
    found: dict[Tile, Static] = {}
    for tile, one in zip(tiles, compile_all(tasks, jobs), strict=True):
        found.setdefault(fitted(line, tile, one), one)  # the present line is the first
    record: dict[str, Any] = {
        "op": op,
        "name": line.name,
        "dtype": str(dtype).removeprefix("torch."),
        "capability": capability,
        "static": [{"tile": tile, **asdict(one)} for tile, one in found.items()],
        "measured": None,
    }
    if ceilings is None:
        console.print(static_table(line, found))
        return record
    device = torch.device("cuda")
    good = [tile for tile, one in found.items() if one.fault is None and tile != line.current]
    contests, rejected = measured(line, good, device, dtype, gpu_timer(device), console.print)
    record["rejected"] = [[tile, why] for tile, why in rejected.items()]
    won = verdict(line, contests, ceilings, dtype.itemsize == 2)
    record["measured"] = won
    record["comment"] = comment(won, ceilings.name, dtype)
    console.print(f"{record['comment']}\n{won['line']}\n", markup=False, soft_wrap=True)
    return record


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="+", choices=[*OPS, "all"], metavar="OP",
                        help=f"{', '.join(OPS)} or all")  # fmt: skip
    parser.add_argument("--only", default="*", help="lines whose names match this pattern")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--arch", type=int, choices=sorted(ARCHITECTURES),
                        help="compute capability without a GPU (default: 90)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="no line is begun later than this")  # fmt: skip
    parser.add_argument("--json", type=Path, help="written anew after each line")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json must be a file in a folder that is there, got {options.json}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where a line could not be swept, 2 for a wrong argument, 130 after an
    interrupt."""
    start = time.monotonic()
    o = parse(argv)
    console = Console(highlight=False)
    dtype: torch.dtype = getattr(torch, o.dtype)
    ceilings = None
    capability = o.arch or 90
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        own = _host.capability(device)
        assert own is not None
        if o.arch not in (None, own):
            return cli.failed(f"--arch is {o.arch}, but the GPU here has {own}")
        capability = own
        found = machine.ceilings(device)
        name = torch.cuda.get_device_name(device)
        ceilings = Ceilings(name, found["matmul_tflops"], found["copy_tb_per_s"])
    else:
        console.print(f"No CUDA GPU: nothing is timed. Compiled for sm_{capability}.")
    if capability not in ARCHITECTURES:
        return cli.failed(f"sm_{capability} is none of {sorted(ARCHITECTURES)}")
    ops = list(OPS) if "all" in o.ops else list(dict.fromkeys(o.ops))
    chosen = [
        (op, line)
        for op in ops
        for line in lines(op, capability, dtype).values()
        if fnmatch.fnmatchcase(line.name, o.only)
    ]
    if not chosen:
        names = ", ".join(name for op in ops for name in lines(op, capability, dtype)) or "none"
        return cli.failed(
            f"--only must match a line, got {o.only!r}; in {o.dtype} there are: {names}"
        )
    records: list[dict[str, Any]] = []
    failures = 0
    for op, line in chosen:
        if time.monotonic() - start > 60 * o.minutes:
            console.print(f"{line.name}: not begun, {o.minutes:g} minutes are over")
            continue
        try:
            records.append(sweep_line(op, line, capability, dtype, o.jobs, ceilings, console))
        except KeyboardInterrupt:
            cli.failed(f"interrupted in {line.name}")
            return 130
        except Exception as error:  # whatever it is, the other lines are swept all the same
            traceback.print_exc()
            records.append({"op": op, "name": line.name, "measured": None})
            records[-1]["failure"] = failure_of(error)
            failures += 1
            console.print(f"{line.name}: {failure_of(error)}", markup=False)
        if o.json is not None:
            write_json(o.json, records)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
