"""Looks for better lines of the launch tables.

    python bench/sweep.py attention                 # on a GPU: compiled, checked, measured
    python bench/sweep.py gemm --arch 100           # without one: compiled, with predictions
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
import multiprocessing
import os
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _machine
import torch
from _ceilings import Ceilings
from _multiprocessor import ARCHITECTURES
from _static import Launch, compile_launches, recorded
from _static import _no_gpu_needed as no_gpu_needed
from _sweep import OPS, Call, Line, Sizes, Tile, lines
from _timing import Clock, interleaved
from _visit import write_json
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.errors import TritonError

from fastgpt.kernels import _common

ROUNDS = (3, 15)  # of all candidates, and of those that are close to the best
CLOSE = 1.15
FINALISTS = 8
LEAST_GAIN = 0.01
_FLUSH_BYTES = 1 << 30  # many times the cache

Timer = Callable[[Call], float]  # milliseconds of one run of the call


# ------------------------------------------------------------------------------------ compilation


@dataclass(frozen=True)
class Task:
    """One candidate, by names that another process understands."""

    op: str
    line: str
    tile: Tile
    capability: int
    dtype: torch.dtype
    keep: bool = False  # what the compiler makes in Triton's cache, for the process that times it


@dataclass(frozen=True)
class Static:
    """What the compiler made of a candidate; ``fault`` says why it is rejected."""

    fault: str | None
    registers: int = 0
    shared_memory: int = 0
    programs: int = 0
    tensor_share: float | None = None  # of the matrix units' rate in the main loop, predicted


def compiled(task: Task) -> Static:
    """Without a GPU. A crash of the compiler ends the process."""
    if task.tile is None:
        return Static(None)
    line = lines(task.op, task.capability, task.dtype)[task.line]
    try:
        with line.put(task.tile), recorded(task.capability) as launches:
            line.call(torch.device("cpu"), task.dtype, line.probe).run()
        own = [launch for launch in launches if launch.kernel.__name__ in line.kernels]
        records = [one.record() for one in compile_launches(own, task.capability)]
        if task.keep and not any(record["faults"] for record in records):
            compile_into_cache(own, task.capability)
    except (TritonError, RuntimeError) as error:
        return Static(f"does not compile: {last_line(error)}")
    if not records:
        raise ValueError(f"{task.line} launched none of {', '.join(line.kernels)}")
    programs = min(record["occupancy"]["programs"] for record in records)
    faults = [fault.partition("): ")[2] for record in records for fault in record["faults"]]
    if not faults and programs == 0:
        faults = ["does not fit on a multiprocessor"]
    shares = [r["cycles"]["tensor"] / r["cycles"]["serial"] for r in records if r["dots"]]
    return Static(
        faults[0] if faults else None,
        max(record["registers"] for record in records),
        max(record["shared_memory"] for record in records),
        programs,
        min(shares, default=None),
    )


def compile_into_cache(launches: Iterable[Launch], capability: int) -> None:
    """Once more, as the launcher of a GPU of this kind would: Triton's cache then has it."""
    with no_gpu_needed(capability):
        for launch in launches:
            launch.kernel.warmup(*launch.args, grid=(1,), **launch.options)


def fitted(line: Line, tile: Tile, static: Static) -> Tile:
    """The candidate, saying how many of its programs fit on a multiprocessor if it has to."""
    if not line.resident or tile is None or tile == line.current or static.fault is not None:
        return tile
    return (*tile[:-1], static.programs)


def last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def compile_all(
    tasks: Sequence[Task], jobs: int, work: Callable[[Task], Static] = compiled
) -> list[Static]:
    """In processes of their own. A candidate that crashes the compiler is rejected; those that
    shared its pool are tried again, each alone."""
    found: dict[int, Static] = {}
    with _pool(jobs) as pool:
        futures = [pool.submit(work, task) for task in tasks]
        for number, future in enumerate(futures):
            _take(found, number, future)
    for number, task in enumerate(tasks):
        if number not in found:
            with _pool(1) as pool:
                _take(found, number, pool.submit(work, task))
            found.setdefault(number, Static("crashes the compiler"))
    return [found[number] for number in range(len(tasks))]


def _take(found: dict[int, Static], number: int, future: Future[Static]) -> None:
    try:
        found[number] = future.result()
    except BrokenProcessPool:
        return  # this candidate's doing, or a neighbour's


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


# -------------------------------------------------------------------------------------- comparing


def difference(got: Sequence[Tensor], present: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """Where two results differ by more than the order of summation explains: an element by more
    than 4 roundings of its own size and its row's; None if nowhere. A tile that is wrong or missing
    is off by a hundred times that.
    """
    if len(got) != len(present):
        return f"{len(got)} results, not {len(present)}"
    for number, (a, b) in enumerate(zip(got, present, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {number} is {tuple(a.shape)} {a.dtype}"
        if a.numel() == 0:
            continue
        eps = max(torch.finfo(dtype).eps, torch.finfo(b.dtype).eps, 2.0**-12)
        a, b = a.float(), b.float()
        row = b.square().mean(-1, keepdim=True).sqrt() if b.dim() else b.abs()
        excess = (a - b).abs() - 4 * eps * (b.abs() + row)
        if not bool((excess <= 0).all()):  # NaN is not
            wrong = int((~(excess <= 0)).sum())
            return f"result {number} differs in {wrong} of {b.numel()} elements"
    return None


# ----------------------------------------------------------------------------------------- timing


def gpu_timer(device: torch.device) -> Timer:
    """The GPU's time. The host prepares the call while the GPU still writes a buffer that is larger
    than its cache."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)

    def time_call(call: Call) -> float:
        call.reset()
        flush.fill_(1)
        clock = Clock(device)
        clock.mark()
        call.run()
        clock.mark()
        return clock.durations_ms()[0]

    return time_call


@dataclass
class Contest:
    """All candidates of a line at one size: their medians in milliseconds."""

    sizes: Sizes
    present_ms: float
    again_ms: float  # the present line a second time
    ms: dict[Tile, float]
    flops: int
    bytes: int


def fault_of(
    line: Line, tile: Tile, call: Call, present: Sequence[Tensor], dtype: torch.dtype
) -> str | None:
    """What is wrong with the candidate's results; None if nothing."""
    with line.put(tile):
        call.reset()
        try:
            return difference(call.run(), present, dtype)
        except TritonError as error:
            return f"does not launch: {last_line(error)}"


def wrong(
    line: Line, tiles: Iterable[Tile], device: torch.device, dtype: torch.dtype
) -> dict[Tile, str]:
    """The candidates that do not compute what the present line computes, and where."""
    found: dict[Tile, str] = {}
    left = list(tiles)
    for sizes in line.sizes:
        torch.manual_seed(0)
        with line.put(line.current):
            call = line.call(device, dtype, sizes)
            call.reset()
            present = [out.clone() for out in call.run()]
        for tile in left:
            fault = fault_of(line, tile, call, present, dtype)
            if fault is not None:
                found[tile] = f"{fault} at {label(sizes)}"
        left = [tile for tile in left if tile not in found]
    return found


def contest(
    line: Line,
    tiles: Iterable[Tile],
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
) -> Contest:
    with line.put(line.current):
        call = line.call(device, dtype, sizes)

    def times(entries: Sequence[tuple[Tile, bool]], rounds: int) -> dict[tuple[Tile, bool], float]:
        ms: dict[tuple[Tile, bool], list[float]] = {entry: [] for entry in entries}
        for _, entry in interleaved(entries, rounds):
            with line.put(entry[0]):
                ms[entry].append(timer(call))
        return {entry: statistics.median(values) for entry, values in ms.items()}

    own = [(line.current, False), (line.current, True)]  # True: again
    ms = times([*own, *((tile, False) for tile in tiles)], ROUNDS[0])
    best = min(ms.values())
    close = sorted((e for e in ms if e not in own and ms[e] <= CLOSE * best), key=ms.__getitem__)
    ms |= times([*own, *close[:FINALISTS]], ROUNDS[1])
    return Contest(
        sizes,
        ms.pop(own[0]),
        ms.pop(own[1]),
        {tile: value for (tile, _), value in ms.items()},
        call.flops,
        call.bytes,
    )


def label(sizes: Sizes) -> str:
    return " ".join(f"{name}{size}" for name, size in sizes.items())


def measured(
    line: Line,
    tiles: Sequence[Tile],
    device: torch.device,
    dtype: torch.dtype,
    timer: Timer,
    show: Callable[[str], None],
) -> tuple[list[Contest], dict[Tile, str]]:
    """One contest a size; why candidates were rejected before."""
    show(f"{line.name}: checking {len(tiles)} candidates")
    rejected = wrong(line, tiles, device, dtype)
    left = [tile for tile in tiles if tile not in rejected]
    contests = []
    for sizes in line.sizes:
        show(f"{line.name}: timing {len(left)} candidates at {label(sizes)}")
        contests.append(contest(line, left, sizes, device, dtype, timer))
    return contests, rejected


def verdict(
    line: Line, contests: Sequence[Contest], ceilings: Ceilings, half: bool
) -> dict[str, Any]:
    """The best candidate over all sizes, or the present line."""
    scores: dict[Tile, float] = {line.current: 1.0}
    for tile in contests[0].ms:
        ratios = [contest.ms[tile] / contest.present_ms for contest in contests]
        scores[tile] = statistics.geometric_mean(ratios)
    noise = statistics.geometric_mean(
        [math.exp(abs(math.log(c.again_ms / c.present_ms))) for c in contests]
    )
    best = min(scores, key=scores.__getitem__)
    gain = 1.0 / scores[best]
    if gain <= max(noise, 1.0 + LEAST_GAIN):
        best, gain = line.current, 1.0
    rows = []
    for found in contests:
        ms = {line.current: found.present_ms, **found.ms}
        own_best = min(ms, key=ms.__getitem__)
        rows.append(
            {
                "sizes": dict(found.sizes),
                "ms": ms[best],
                "present_ms": found.present_ms,
                "present_again_ms": found.again_ms,
                "tflop_per_s": found.flops / ms[best] / 1e9 if found.flops else None,
                "tb_per_s": found.bytes / ms[best] / 1e9,
                "share_of_ceiling": ceilings.ms(found.flops, found.bytes, half) / ms[best],
                "own_best": own_best,
                "own_best_ms": ms[own_best],
            }
        )
    return {
        "best": best,
        "present": line.current,
        "gain": gain,
        "noise": noise - 1.0,
        "sizes": rows,
        "scores": [[tile, score] for tile, score in sorted(scores.items(), key=lambda x: x[1])],
        "line": line.text(best),
    }


def comment(found: dict[str, Any], machine: str, dtype: torch.dtype) -> str:
    """What stands above the line in the table."""
    first = found["sizes"][0]
    flops = "" if first["tflop_per_s"] is None else f", {first['tflop_per_s']:.0f} TFLOP/s"
    text = (
        f"{machine}, {str(dtype).removeprefix('torch.')}: {first['ms']:.4g} ms at "
        f"{label(first['sizes'])}{flops}, {first['tb_per_s']:.2f} TB/s, "
        f"{first['share_of_ceiling']:.0%} of the ceiling; "
    )
    if found["best"] == found["present"]:
        text += f"none of {len(found['scores']) - 1} others is faster"
    else:
        text += f"{found['gain']:.2f}x of {found['present']} over {len(found['sizes'])} sizes"
    others = [
        f"{tuple(row['own_best'] or ()) or 'cuBLAS'} {row['ms'] / row['own_best_ms']:.2f}x "
        f"at {label(row['sizes'])}"
        for row in found["sizes"]
        if row["ms"] > 1.03 * row["own_best_ms"]
    ]
    text += f" (faster at one size: {'; '.join(others)})" if others else ""
    return "\n".join(textwrap.wrap(text, 98, initial_indent="# ", subsequent_indent="# "))


# ----------------------------------------------------------------------------------- command line


def static_table(line: Line, found: dict[Tile, Static]) -> Table:
    """Those without a fault, the highest predicted share of the matrix units' rate first."""
    title = f"{line.name}: {line.text(line.current)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("candidate\n", no_wrap=True)
    for header in ("registers\n", "shared\nKB", "programs\n/SM", "tensor share,\npredicted"):
        table.add_column(header, justify="right", no_wrap=True)
    good = [(tile, one) for tile, one in found.items() if one.fault is None]
    for tile, one in sorted(good, key=lambda item: -(item[1].tensor_share or 0.0)):
        name = "cuBLAS" if tile is None else str(tile)
        figures = (str(one.registers), f"{one.shared_memory / 1024:.0f}", str(one.programs))
        table.add_row(
            f"{name} (present)" if tile == line.current else name,
            *("---" if tile is None else figures),
            "-" if one.tensor_share is None else f"{one.tensor_share:.0%}",
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
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 for a wrong argument."""
    start = time.monotonic()
    o = parse(argv)
    console = Console(highlight=False)
    errors = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    dtype: torch.dtype = getattr(torch, o.dtype)
    ceilings = None
    capability = o.arch or 90
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        own = _common.capability(device)
        assert own is not None
        if o.arch not in (None, own):
            errors.print(f"error: --arch is {o.arch}, but the GPU here has {own}", style="bold red")
            return 2
        capability = own
        found = _machine.ceilings(device)
        name = torch.cuda.get_device_name(device)
        ceilings = Ceilings(name, found["matmul_tflops"], found["copy_tb_per_s"])
    else:
        console.print(
            f"No CUDA GPU: nothing is timed. Compiled for sm_{capability}; predictions tell "
            "candidates apart that differ by more than 10%."
        )
    if capability not in ARCHITECTURES:
        errors.print(f"error: sm_{capability} is none of {sorted(ARCHITECTURES)}", style="bold red")
        return 2
    ops = list(OPS) if "all" in o.ops else list(dict.fromkeys(o.ops))
    chosen = [
        (op, line)
        for op in ops
        for line in lines(op, capability, dtype).values()
        if fnmatch.fnmatchcase(line.name, o.only)
    ]
    if not chosen:
        names = ", ".join(name for op in ops for name in lines(op, capability, dtype)) or "none"
        errors.print(
            f"error: --only must match a line, got {o.only!r}; in {o.dtype} there are: {names}",
            style="bold red",
        )
        return 2
    records: list[dict[str, Any]] = []
    for op, line in chosen:
        if time.monotonic() - start > 60 * o.minutes:
            console.print(f"{line.name}: not begun, {o.minutes:g} minutes are over")
            continue
        records.append(sweep_line(op, line, capability, dtype, o.jobs, ceilings, console))
        if o.json is not None:
            write_json(o.json, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
