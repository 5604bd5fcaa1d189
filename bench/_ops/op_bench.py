"""What the files ``bench_<op>.py`` share: who computes an op, whether it is right, and how long it
takes as a share of what it would have to.

    pytest -n0 bench                                     # every op
    pytest -n0 bench/bench_attention.py -k "T1024 and not compile" --benchmark-json=out.json

A row is one op, shape, direction and provider:

- ``fused`` is ours on CUDA and ``torch_ops`` ours elsewhere; ``eager`` is what nanoGPT calls;
  ``compile`` is torch.compile of that; ``liger`` is Liger-Kernel's op where it has one.
- Before it is timed, its output and its gradients are compared with the plain op on the same
  numbers, in float32 for half precision and in float64 for float32: as a root mean square it may
  err twice as much as ``eager``, plus 1e-5. (A loss plus 1e-5 of itself: how much one number errs
  in one run of ``eager`` is luck.)
- Timed are ``forward`` (the graph for the backward is recorded, as in training), ``backward`` (of a
  graph made for this one time); for an op that takes its gradients in the forward pass,
  ``inference`` (under no_grad) and ``forward+backward``; and ``inference`` alone for one without.
- A round is one call on inputs that no cache holds: a large buffer is written before it. On CUDA
  two events enclose the call, and the host prepares it while the GPU still writes the buffer, at
  least 0.1 ms: what is measured is the GPU's time, unless the host needs longer than that and than
  the kernels before. Elsewhere it is the host's clock. pytest-benchmark reads it as its timer.
- GB/s and TFLOP/s count, for every provider alike, the bytes and FLOPs that the fused op must move
  and do, by the cost formulas that ``roofline.py`` adds up too. What a provider moves beside them,
  or computes twice, makes it slower and not busier. The share of the ceiling is the least time that
  these take at the machine's own matrix and copy rates, measured in the same run, over the median.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bench._harness import machine
from bench._harness.timing import Clock, Spread, rate, spread
from bench._roofline.ceilings import DEVICES, Ceilings
from bench._roofline.counting import CostMode, LiveMemory, OpTotal
from bench._step import variants
from fastgpt.kernels import _host, fused, reference, torch_ops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16 if _ON_GPU else torch.float32
PROVIDERS = ("fused", "torch_ops", "eager", "compile", "liger")

_ROUNDS, _WARMUP_ROUNDS = (100, 10) if _ON_GPU else (10, 2)
_SCRATCH_BYTES = 1 << 30 if _ON_GPU else 1 << 26  # more than the last level of cache

Direction = Literal["forward", "backward", "inference", "forward+backward"]
Sizes = tuple[tuple[str, int], ...]  # (("B", 32), ("T", 1024), ...)
Function = Callable[..., Any]  # of the inputs: a tensor or several


@dataclass(frozen=True)
class Draw:
    """Where an op's inputs come from: random numbers, never zeros, or fake tensors under a
    ``FakeTensorMode``."""

    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int, std: float = 1.0) -> Tensor:
        """N(0, std²), wanting a gradient."""
        x = torch.randn(shape, device=self.device, dtype=self.dtype)
        return x.mul_(std).requires_grad_()

    def ids(self, n_ids: int, *shape: int) -> Tensor:
        """int64 from 0 to n_ids - 1."""
        return torch.randint(n_ids, shape, device=self.device)


@dataclass(frozen=True, eq=False)
class Op:
    """One op: its sizes, its inputs, and what it is compared with.

    ``name``: of the function in ``fused``, ``torch_ops`` and ``reference``, all of which take
    ``inputs(draw, **sizes)`` as positional arguments, as ``eager``, ``truth`` and ``liger`` do.
    ``truth``: the plain op where ``reference`` would not fit into memory. ``flops(direction,
    **sizes)``: what the op needs, where our kernels compute a product twice. ``traced``: what is
    counted, where the fused op's function looks at numbers.
    """

    name: str
    inputs: Callable[..., tuple[Any, ...]]
    eager: Function
    gpu_sizes: Sequence[dict[str, int]]
    cpu_sizes: Sequence[dict[str, int]]
    directions: tuple[Direction, ...] = ("forward", "backward")
    liger: Function | None = None
    truth: Function | None = None
    flops: Callable[..., int] | None = None
    traced: Function | None = None

    @property
    def rows(self) -> pytest.MarkDecorator:
        """Parametrizes a test with ``row``, every row of this op on this machine."""
        return pytest.mark.parametrize("row", [row.param() for row in self._rows()])

    def _rows(self) -> Iterator["Row"]:
        for sizes in self.gpu_sizes if _ON_GPU else self.cpu_sizes:
            for direction in self.directions:
                for provider in PROVIDERS:
                    if provider != "liger" or self.liger is not None:
                        yield Row(self, tuple(sizes.items()), direction, provider)

    def function(self, provider: str) -> Function:
        if provider in ("fused", "torch_ops"):
            return cast(Function, getattr(fused if provider == "fused" else torch_ops, self.name))
        if provider == "compile":
            return torch.compile(self.eager, fullgraph=True, dynamic=False)
        found = self.eager if provider == "eager" else self.liger
        assert found is not None
        return found

    def plain(self) -> Function:
        return self.truth or cast(Function, getattr(reference, self.name))


def why_not(provider: str) -> str | None:
    """Why this machine has no such provider; None if it has."""
    if provider == "fused" and not _ON_GPU:
        return "the Triton kernels need a CUDA GPU: the time of the interpreter says nothing"
    if provider == "torch_ops" and _ON_GPU:
        return "it serves machines without CUDA"
    if provider == "compile":
        return variants.why_not(variants.VARIANTS["sdpa_compile"], DEVICE)
    if provider == "liger":
        if not _ON_GPU:
            return "Liger-Kernel needs a CUDA GPU"
        if importlib.util.find_spec("liger_kernel") is None:
            return "Liger-Kernel is not installed (pip install liger-kernel)"
    return None


class Stopwatch:
    """A timer for pytest-benchmark that goes on inside of ``time`` alone."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    def read(self) -> float:
        """Seconds of all calls so far."""
        return sum(self.ms) / 1e3

    def time(self, work: Callable[[], Any]) -> None:
        clock = Clock(DEVICE)
        clock.mark()
        result = work()
        clock.mark()
        self.ms += clock.durations_ms()
        del result  # only now: freeing a graph is not part of the work


@dataclass(frozen=True, eq=False, repr=False)
class Row:
    """One figure: how long ``provider`` takes for ``op`` in one direction."""

    op: Op
    sizes: Sizes
    direction: Direction
    provider: str
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def __repr__(self) -> str:
        return f"{self.op.name} {self.shape} {self.direction} {self.provider}"

    @property
    def shape(self) -> str:
        return shape(self.sizes)

    def param(self) -> Any:
        """For ``pytest.mark.parametrize``."""
        reason = why_not(self.provider)
        group = f"{self.op.name} {self.shape} {self.direction}"
        marks = [pytest.mark.benchmark(group=group, timer=self.stopwatch.read)]
        if reason is not None:
            marks.append(pytest.mark.skip(reason=f"{self.provider}: {reason}"))
        return pytest.param(self, id=f"{self.shape}-{self.direction}-{self.provider}", marks=marks)

    def measure(self, benchmark: Any, record_property: Callable[[str, Any], None]) -> None:
        """Check, time, and leave the figures in ``benchmark.extra_info``, which goes into the JSON
        file, and in the property ``figures``, for the table."""
        subject = Subject.of(self.op, self.sizes)
        function = subject.checked(self.provider)

        def prepare() -> Callable[[], Any]:
            return prepared(self.direction, function, subject.inputs, subject.out_grads)

        ms = timed(benchmark, self.stopwatch, prepare)
        figures = self.figures(ms, machine_ceilings())
        benchmark.extra_info.update(figures)
        record_property("figures", figures)

    def figures(self, ms: Spread, ceilings: Ceilings | None) -> dict[str, Any]:
        """What is known of the row when it took ``ms``. What does not apply is None."""
        least = cost(self.op, self.sizes, self.direction, DTYPE, ceilings or DEVICES["h200"])
        return figures(
            self.op.name,
            self.sizes,
            self.direction,
            self.provider,
            ms,
            least.bytes,
            least.flops,
            least.ms if ceilings else None,
        )


def timed(benchmark: Any, stopwatch: Stopwatch, prepare: Callable[[], Callable[[], Any]]) -> Spread:
    """Milliseconds of what ``prepare`` returns, over ``_ROUNDS`` rounds."""

    def setup() -> tuple[tuple[Callable[[], Any]], dict[str, Any]]:
        work = prepare()
        _scratch().fill_(1)
        return (work,), {}

    benchmark.pedantic(stopwatch.time, setup=setup, rounds=_ROUNDS, warmup_rounds=_WARMUP_ROUNDS)
    return spread(stopwatch.ms[-_ROUNDS:])


def figures(
    op: str,
    sizes: Sizes,
    direction: str,
    provider: str,
    ms: Spread,
    nbytes: int,
    flops: int,
    least_ms: float | None,
) -> dict[str, Any]:
    """A row of a table, and of the JSON file. ``least_ms``: at the machine's ceilings."""
    return {
        "op": op,
        "shape": shape(sizes),
        **dict(sizes),
        "dtype": str(DTYPE).removeprefix("torch."),
        "direction": direction,
        "provider": provider,
        "ms": ms.median,
        "ms_p10": ms.p10,
        "ms_p90": ms.p90,
        "bytes": nbytes,
        "flops": flops,
        "gb_per_s": rate(ms, nbytes).median / 1e9,
        "tflop_per_s": rate(ms, flops).median / 1e12 if flops else None,
        "share_of_ceiling": None if least_ms is None else least_ms / ms.median,
    }


def shape(sizes: Sizes) -> str:
    return "-".join(f"{name}{size}" for name, size in sizes)


class Subject:
    """The inputs of an op at one size, and what is right for them."""

    def __init__(self, op: Op, sizes: Sizes) -> None:
        torch.compiler.reset()  # compiled for other sizes; dynamo keeps a few versions only
        torch.manual_seed(0)
        self._op = op
        self._checked: dict[str, Function] = {}
        self.inputs = op.inputs(Draw(DEVICE, DTYPE), **dict(sizes))
        self.out_grads = gradients_like(op.eager(*self.inputs))
        wide = torch.float64 if DTYPE == torch.float32 else torch.float32
        self._truth = self._results(op.plain(), wide)
        self._errors = self._deviations(op.eager)

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def of(op: Op, sizes: Sizes) -> "Subject":
        """One at a time in memory: rows of the same sizes are neighbours."""
        return Subject(op, sizes)

    def checked(self, provider: str) -> Function:
        """The provider's function, if it is right; AssertionError if not."""
        if provider not in self._checked:
            function = self._op.function(provider)
            self.check(provider, function)
            self._checked[provider] = function
        return self._checked[provider]

    def check(self, provider: str, function: Function) -> None:
        """AssertionError where an output or a gradient errs too much."""
        found = self._deviations(function)
        columns = zip(found, self._errors, self._truth, strict=True)
        for number, (error, eager, right) in enumerate(columns):
            n_outputs = len(self.out_grads)
            name = f"output {number}" if number < n_outputs else f"gradient {number - n_outputs}"
            allowed = 2 * eager + 1e-5 * (1.0 if right.dim() else float(right))
            assert error <= allowed, (
                f"{self._op.name} by {provider}: {name} has an RMS error of {error:.3g}, "
                f"allowed are {allowed:.3g}"
            )

    def _deviations(self, function: Function) -> list[float]:
        """Root mean squares, of each output and then of each gradient."""
        return [
            rms(got.to(right.dtype) - right)
            for got, right in zip(self._results(function, DTYPE), self._truth, strict=True)
        ]

    def _results(self, function: Function, dtype: torch.dtype) -> list[Tensor]:
        """Outputs, then gradients, computed in ``dtype``."""
        inputs = tuple(converted(x, dtype) for x in self.inputs)
        outputs = tensors(function(*inputs))
        grads = [g.to(out.dtype) for g, out in zip(self.out_grads, outputs, strict=True)]
        leaves = [x for x in inputs if wants_gradient(x)]
        found = torch.autograd.grad(outputs, leaves, grads) if leaves else ()
        return [result.detach() for result in (*outputs, *found)]


def rms(x: Tensor) -> float:
    """Root mean square."""
    return float(x.square().mean().sqrt())


def converted(x: Any, dtype: torch.dtype) -> Any:
    """``x`` in ``dtype`` if it is a tensor of floating-point numbers; a leaf of its own."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        return x
    return x.detach().to(dtype).requires_grad_(x.requires_grad)


def wants_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def tensors(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def gradients_like(out: Any) -> list[Tensor]:
    """A random gradient for each output; 1 for a loss."""
    return [torch.randn_like(t) if t.dim() else torch.ones_like(t) for t in tensors(out)]


def prepared(
    direction: Direction, function: Function, inputs: tuple[Any, ...], out_grads: list[Tensor]
) -> Callable[[], Any]:
    """The work of a direction, all that comes before it done."""
    leaves = [x for x in inputs if wants_gradient(x)]
    if direction == "forward":
        return lambda: function(*inputs)
    if direction == "inference":
        without_graph = torch.no_grad()(function)
        return lambda: without_graph(*inputs)
    if direction == "backward":
        outputs = tensors(function(*inputs))
        return lambda: torch.autograd.grad(outputs, leaves, out_grads)
    return lambda: torch.autograd.grad(tensors(function(*inputs)), leaves, out_grads)


def cost(
    op: Op, sizes: Sizes, direction: Direction, dtype: torch.dtype, ceilings: Ceilings
) -> OpTotal:
    """Bytes and FLOPs of the fused op, and its milliseconds at the ceilings, by its cost formula.
    Nothing is allocated or launched, as in ``roofline.py``."""
    function = op.traced or op.function("fused")
    with FakeTensorMode(), mock.patch.object(_host, "INTERPRETED", True):
        inputs = op.inputs(Draw(torch.device("cpu"), dtype), **dict(sizes))
        out_grads = gradients_like(function(*inputs))
        work = prepared(direction, function, inputs, out_grads)
        mode = CostMode(ceilings, LiveMemory())
        with mode:
            work()
    total = OpTotal()
    for kind in mode.ops.values():
        total.calls += kind.calls
        total.bytes += kind.bytes
        total.flops += kind.flops
        total.ms += kind.ms
    if op.flops is not None:
        total.flops = op.flops(direction, **dict(sizes))
        total.ms = ceilings.ms(total.flops, total.bytes, dtype.itemsize == 2)
    return total


@functools.cache
def machine_ceilings() -> Ceilings | None:
    """What this GPU reaches, measured once; None without one."""
    if not _ON_GPU:
        return None
    found = machine.ceilings(DEVICE)
    return Ceilings("measured", found["matmul_tflops"], found["copy_tb_per_s"])


@functools.cache
def _scratch() -> Tensor:
    return torch.empty(_SCRATCH_BYTES, dtype=torch.uint8, device=DEVICE)
