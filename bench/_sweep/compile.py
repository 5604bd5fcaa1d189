"""What the compiler makes of the candidates of a launch table, with no GPU and on all cores."""

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from triton.errors import TritonError

from bench._compile.static import Launch, compile_launches, no_gpu_needed, recorded
from bench._sweep.line import Line, Tile
from bench._sweep.tables import lines


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
    return Static(
        faults[0] if faults else None,
        max(record["registers"] for record in records),
        max(record["shared_memory"] for record in records),
        programs,
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
