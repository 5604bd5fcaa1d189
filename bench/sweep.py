"""Looks for better launch configurations.

    python bench/sweep.py attention                 # on a GPU: compiled, checked, timed
    python bench/sweep.py gemm --arch=100           # without one: compiled
    python bench/sweep.py attention layer_norm --only='*fwd*'

The benchmarks' calls show which configurations an op asks for. The neighbours of each are compiled
ahead of time on all cores; those that spill, need too much shared memory, leave the tensor cores
idle or do not compile are rejected. On a GPU the others are checked against the plain op and timed
beside the present one at every size of the benchmark. Printed is the best by the geometric mean, as
a line for ``kernels/configs.py``: not the present one if it wins by 1% and by more than the noise,
which is the difference of the present one's two measurements.
"""

import argparse
import contextlib
import fnmatch
import importlib
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from rich.console import Console

if __name__ == "__main__":  # Python looks for modules in the folder of the script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._compile.multiprocessor import ARCHITECTURES
from bench._compile.static import Launch, compile_launches, faults, no_gpu_needed, recorded
from bench._harness import cli
from bench._harness.timing import interleaved
from bench._ops import op_bench
from bench._ops.op_bench import Case, Direction, Op, RandomTensors, Stopwatch, prepared
from fastgpt.kernels import _host, configs
from fastgpt.kernels.configs import CUBLAS, Gemm, Key

BENCHMARKS: dict[str, list[str]] = {}  # of an op of configs.TABLE
for _benchmark, _op in op_bench.every_op().items():
    if _op.table:
        BENCHMARKS.setdefault(_op.table, []).append(_benchmark)
ROUNDS = 10
LEAST_GAIN = 1.01
# Sizes that no configuration depends on, and what they are while nothing is computed.
_SHRUNK = {"B": 1, "T": 128, "M": 16, "S": 512, "N": 2**16}
_SHRUNK_OF = {
    "embedding": {"V": 512},
    "linear_cross_entropy": {"C": 64},
    "linear_cross_entropy in fp8": {"C": 64, "V": 512},
    "linear: weight gradient": {"M": 4096},  # summed in parts
}
_MARK = 1024  # as num_warps: a launch that shows it takes its configuration from this request

Config = Any  # of configs.TABLE


class Request(NamedTuple):
    """The arguments of ``configs.lookup``."""

    op: str
    kernel: str
    capability: int
    dtype: torch.dtype
    size: int | str
    options: tuple[str, ...]

    def __str__(self) -> str:
        size = [] if self.size == configs.ANY else [str(self.size)]
        return " ".join((self.op, self.kernel, *size, *self.options))

    def line(self, config: Config) -> str:
        """As it stands in the table."""
        dtype = "half" if _host.is_half(self.dtype) else str(self.dtype).removeprefix("torch.")
        arch = configs.architecture(self.capability)
        key = tuple(Key(self.op, self.kernel, arch, dtype, self.size, self.options))
        value = "CUBLAS" if config == CUBLAS else repr(config)
        return f"Key{key}: {value},".replace("'", '"')


@dataclass
class Subject:
    """A configuration that a benchmark asks for, and at which of its sizes."""

    request: Request
    benchmark: str
    dtype: torch.dtype
    direction: Direction
    sizes: list[dict[str, int]] = field(default_factory=list)

    @property
    def candidates(self) -> list[Config]:
        """The present one first."""
        present = tile = configs.lookup(*self.request)
        if present == CUBLAS:  # beside it the neighbours of another architecture's tile
            tile = configs.lookup(*self.request._replace(capability=100))
        if tile == CUBLAS:
            return [CUBLAS]
        choices = [neighbours(tile, name) for name in tile._fields]
        found = [present, tile, *(type(tile)(*values) for values in itertools.product(*choices))]
        return list(dict.fromkeys(found + [CUBLAS] * isinstance(tile, Gemm)))


def neighbours(config: Config, name: str) -> list[Any]:
    """What a field may be; the compiler refuses what does not fit."""
    value = getattr(config, name)
    if name == "num_warps" and "num_stages" in config._fields:
        return [4, 8]
    if name.startswith("BLOCK") or name in ("PARTS", "num_warps"):
        return [n for n in (value // 2, value, 2 * value) if n and (name != "num_warps" or n <= 32)]
    if name == "num_stages":
        return [n for n in (value - 1, value, value + 1) if n]
    return [value, None] if name in ("PIPELINED_PV", "maxnreg") and value else [value]


@contextlib.contextmanager
def using(request: Request, config: Config) -> Iterator[None]:
    """Within, ``configs`` answers this request with ``config``."""
    lookup = configs.lookup

    def answer(*asked: Any) -> Config:
        return config if asked == request else lookup(*asked)

    with mock.patch.object(configs, "lookup", answer):
        yield


def op_of(benchmark: str, dtype: torch.dtype) -> Op:
    file, _, name = benchmark.partition(".")
    op: Op = getattr(importlib.import_module(f"bench.bench_{file}"), name)
    return op if file == "adamw" else replace(op, dtype=dtype)


def provider_of(op: Op) -> str:
    return "fp8" if "fp8" in op.providers else "fused"


def work_of(op: Op, direction: Direction, sizes: dict[str, int]) -> Callable[[], Any]:
    """On small CPU tensors: within ``recorded``, where no kernel computes anything."""
    shrunk = _SHRUNK | _SHRUNK_OF.get(op.name, {})
    sizes = {name: min(size, shrunk.get(name, size)) for name, size in sizes.items()}
    inputs = op.inputs(RandomTensors(torch.device("cpu"), op.dtype), **sizes)
    function = op.providers[provider_of(op)]
    grads = op_bench.gradients_like(function(*inputs)) if op.has_gradients else []
    return prepared(direction, function, inputs, grads)


def subjects(name: str, capability: int, dtype: torch.dtype) -> list[Subject]:
    """What the op's benchmarks ask for on the architecture, each once, with all its sizes."""
    found: dict[Request, Subject] = {}
    lookup = configs.lookup
    for benchmark in BENCHMARKS[name]:
        op = op_of(benchmark, dtype)
        # The last direction counts: it has the gradients.
        for direction, sizes in itertools.product(op.directions, op.gpu_sizes):
            with recorded(capability):
                work = work_of(op, direction, sizes)
                with mock.patch.object(configs, "lookup", mock.Mock(side_effect=lookup)) as spy:
                    work()
            for request in dict.fromkeys(Request(*call.args) for call in spy.call_args_list):
                if request.op == name:
                    new = Subject(request, benchmark, dtype, direction)
                    one = found.setdefault(request, new)
                    if one.benchmark == benchmark:
                        one.direction = direction
                        one.sizes += [sizes] * (sizes not in one.sizes)
    return list(found.values())


# ------------------------------------------------------------------------------------- compiling


class Made(NamedTuple):
    """What the compiler made of a candidate; ``fault``: why it is rejected."""

    fault: str | None
    registers: int = 0
    shared_memory: int = 0
    programs: int = 0


def compiled(subject: Subject, config: Config, keep: bool) -> Made:
    """``keep``: also in Triton's own cache, for the process that times it."""
    if config == CUBLAS:
        return Made(None)
    capability, op = subject.request.capability, op_of(subject.benchmark, subject.dtype)
    with recorded(capability) as launches:
        work = work_of(op, subject.direction, subject.sizes[0])
        with using(subject.request, config._replace(num_warps=_MARK)):
            work()
    own = [
        Launch(one.kernel, one.args, {**one.options, "num_warps": config.num_warps})
        for one in launches
        if one.options.get("num_warps") == _MARK
    ]
    try:
        found = compile_launches(own, capability)
        wrong = [fault.partition("): ")[2] for one in found for fault in faults(one)]
        if keep and not wrong:
            with no_gpu_needed(capability):
                for one in own:
                    one.kernel.warmup(*one.args, grid=(1,), **one.options)
    except Exception as error:  # Triton, MLIR and ptxas share no class for what they refuse
        return Made(f"does not compile: {cli.failure_of(error)}")
    return Made(
        wrong[0] if wrong else None,
        max(one.registers for one in found),
        max(one.shared_memory for one in found),
        min(one.programs for one in found),
    )


def compile_all(
    subject: Subject, candidates: Sequence[Config], jobs: int, keep: bool
) -> list[Made]:
    """On ``jobs`` processes. A crash of the compiler fails all that are left: each of them is
    compiled again alone, and rejected if it crashes."""

    def on_pool(configs: Sequence[Config], size: int) -> list[Made | None]:
        with ProcessPoolExecutor(size, multiprocessing.get_context("spawn")) as pool:
            tasks = [pool.submit(compiled, subject, config, keep) for config in configs]
        crashed = [isinstance(task.exception(), BrokenProcessPool) for task in tasks]
        # Any other exception is a fault of this program, and raised.
        return [None if gone else task.result() for gone, task in zip(crashed, tasks, strict=True)]

    made = on_pool(candidates, jobs)
    return [
        one or on_pool([config], 1)[0] or Made("crashes the compiler")
        for one, config in zip(made, candidates, strict=True)
    ]


# ----------------------------------------------------------------------------- on a GPU: timing


def timed(
    subject: Subject, candidates: Sequence[Config], show: Callable[[str], None]
) -> dict[int, list[float]]:
    """Medians in milliseconds at each of the subject's sizes, of the candidates (by number) that
    are right; -1: the present one, a second time."""
    op = op_of(subject.benchmark, subject.dtype)
    provider = provider_of(op)
    function = op.providers[provider]
    ms: dict[int, list[float]] = {number: [] for number in range(-1, len(candidates))}
    for sizes in subject.sizes:
        case = Case(op, tuple(sizes.items()))
        for number in list(ms):
            with using(subject.request, candidates[max(number, 0)]):
                try:
                    (op.check or case.check)(provider, function, case.inputs)
                except (AssertionError, triton.TritonError) as error:
                    show(f"{candidates[max(number, 0)]} is wrong: {cli.failure_of(error)}")
                    del ms[number]
        watches = {number: Stopwatch() for number in ms}
        for _, number in interleaved(list(ms), ROUNDS):
            with using(subject.request, candidates[max(number, 0)]):
                work = prepared(subject.direction, function, case.inputs, case.out_grads)
                op_bench.occupy_device()
                watches[number].time(work)
        for number, watch in watches.items():
            ms[number].append(statistics.median(watch.ms))
    return ms


def verdict(ms: dict[int, list[float]]) -> tuple[int, float, float]:
    """The best candidate, how many times as fast as the present one it is, and the noise: how many
    times the present one's two measurements differ."""
    gains = {
        number: statistics.geometric_mean([a / b for a, b in zip(ms[0], times, strict=True)])
        for number, times in ms.items()
    }
    noise = math.exp(abs(math.log(gains.pop(-1))))
    best = max(gains, key=gains.__getitem__)
    return (best if gains[best] > max(noise, LEAST_GAIN) else 0), gains[best], noise


def sweep(subject: Subject, jobs: int, on_gpu: bool, show: Callable[[str], None]) -> None:
    """Print what the compiler made of the candidates or, on a GPU, the best line."""
    candidates = subject.candidates
    show(f"{subject.request}: compiling {len(candidates)} candidates")
    made = compile_all(subject, candidates, jobs, on_gpu)
    good = [(config, one) for config, one in zip(candidates, made, strict=True) if not one.fault]
    show(f"{len(made) - len(good)} of {len(made)} rejected")
    if not on_gpu:
        for config, one in good:
            figures = f"{one.registers} registers, {one.shared_memory / 1024:.0f} KB shared"
            show(f"  {config}" + ("" if config == CUBLAS else f": {figures}, {one.programs}/SM"))
        return
    others = [
        config._replace(programs=one.programs) if isinstance(config, Gemm) else config
        for config, one in good
        if config != candidates[0]
    ]
    entrants = [candidates[0], *others]
    ms = timed(subject, entrants, show)
    best, gain, noise = verdict(ms)
    times = (
        f"{time:.4g} ms at {' '.join(f'{name}{n}' for name, n in sizes.items())}"
        for sizes, time in zip(subject.sizes, ms[best], strict=True)
    )
    result = f"{gain:.3f}x of {entrants[0]}" if best else f"best of {len(ms) - 1}"
    where = f"{torch.cuda.get_device_name()}, Triton {triton.__version__}"
    show(f"# {where}: {', '.join(times)}; {result}; noise {noise - 1:.1%}")
    show(subject.request.line(entrants[best]))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where something could not be swept, 2 for a wrong argument."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("ops", nargs="+", choices=BENCHMARKS, metavar="OP", help=", ".join(BENCHMARKS))
    add("--only", default="*", help="configurations whose names match this pattern")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--arch", type=int, choices=ARCHITECTURES, help="without a GPU (default: 90)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    o = parser.parse_args(argv)
    if o.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {o.jobs}")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    own = _host.capability(op_bench.DEVICE)
    if own is None:
        console.print(f"No CUDA GPU: nothing is timed. Compiled for sm_{o.arch or 90}.")
    elif o.arch not in (None, own):
        return cli.failed(f"--arch must be {own}, which the GPU here has, got {o.arch}")
    dtype = getattr(torch, o.dtype)
    found = [one for op in o.ops for one in subjects(op, own or o.arch or 90, dtype)]
    chosen = [one for one in found if fnmatch.fnmatchcase(str(one.request), o.only)]
    if not chosen:
        names = ", ".join(str(one.request) for one in found)
        return cli.failed(f"--only must match a configuration, got {o.only!r}; there are: {names}")
    failures = 0
    for subject in chosen:
        try:
            sweep(subject, o.jobs, own is not None, console.print)
        except Exception as error:  # the others are swept all the same
            traceback.print_exc()
            console.print(f"{subject.request}: {cli.failure_of(error)}")
            failures += 1
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
