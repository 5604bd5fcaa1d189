"""The framework of ``bench_<op>.py``. Each of them lists an op's inputs, sizes and providers; this
module checks the results, measures the times and computes the figures.

    pytest -n0 bench                                     # every op
    pytest -n0 bench/bench_attention.py -k "T1024 and not compile" --benchmark-json=out.json

A row is one op, size, direction and provider:

- ``fused`` is our kernel and needs CUDA. ``torch_ops`` is our op elsewhere, including GPUs of
  compute capability below 7.5, and 7.5 for attention. ``eager`` is what nanoGPT calls; ``compile``
  is torch.compile of that; ``liger`` and ``quack`` are the ops of Liger-Kernel and QuACK, if they
  have one and are installed.
- Before timing, the provider's outputs and gradients are compared with the reference op on the same
  inputs, in float32 for half precision and in float64 for float32. The RMS error may be twice that
  of ``eager``, plus 1e-5; for a loss, a single value whose error varies by chance, plus 1e-5 of it.
- ``forward`` records the graph for the backward, as in training. ``backward`` is timed without the
  preceding forward. An op that computes its gradients in the forward has ``inference`` (under
  no_grad) and ``forward+backward`` instead; an op without gradients has only ``inference``.
- Inputs are not cached: a large buffer is written before each call. On CUDA, two events enclose the
  call, and the host launches it while the GPU still writes the buffer, so launch latency shows only
  if it exceeds both that write and the kernels. Elsewhere the host's clock is used.
- GB/s and TFLOP/s use the same bytes and FLOPs for every provider: those of the fused op, from the
  cost formulas that ``roofline.py`` uses. The share of the ceiling is the least time for these at
  this machine's matrix and copy rates, measured in the same run, divided by the median.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from bench._harness import machine
from bench._harness.timing import Spread, rate, spread
from bench._roofline.ceilings import DEVICES, Ceilings
from bench._roofline.counting import CostMode, OpTotal, fake_tensors
from bench._step import variants
from fastgpt.devices import resolve_dtype, triton_multiplies, triton_refusal
from fastgpt.kernels import fused, torch_ops
from fastgpt.kernels.reference import OPS_OF_TENSOR_CORES
from fastgpt.timing import Occupier, milliseconds
from fastgpt.tuning.phase import Expected, gradients_like, results
from fastgpt.tuning.workload import tensors_in

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_ON_GPU = DEVICE.type == "cuda"
DTYPE = resolve_dtype("auto", DEVICE)

_ROUNDS, _WARMUP_ROUNDS = (100, 10) if _ON_GPU else (10, 2)

Direction = Literal["forward", "backward", "inference", "forward+backward", "update"]
Sizes = tuple[tuple[str, int], ...]  # (("B", 32), ("T", 1024), ...)
Function = Callable[..., Any]  # inputs → a tensor or several


@dataclass(frozen=True)
class RandomTensors:
    """Creates an op's inputs: random tensors, or fake tensors under a ``FakeTensorMode``."""

    device: torch.device
    dtype: torch.dtype

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """N(0, std²), requiring a gradient."""
        x = torch.randn(shape, device=self.device, dtype=self.dtype)
        return x.mul_(std).requires_grad_()

    def ids(self, n_ids: int, *shape: int) -> Tensor:
        """int64 from 0 to n_ids - 1."""
        return torch.randint(n_ids, shape, device=self.device)


# For the compile gate's cases, COMPILED.
BF16, FP16, FP32 = (
    RandomTensors(torch.device("cpu"), dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
)


def standard_providers(name: str, eager: Function, **packages: Function) -> dict[str, Function]:
    """Our ops of that name and their competitors; ``packages``: by key of variants.PACKAGES."""
    ours = {"fused": getattr(fused, name), "torch_ops": getattr(torch_ops, name)}
    return {**ours, "eager": eager, "compile": eager, **packages}


@dataclass(frozen=True, eq=False)
class Op:
    """One op. ``inputs(random, **sizes)`` returns the arguments of every provider and of
    ``reference``, which supports any dtype."""

    name: str
    inputs: Callable[..., tuple[Any, ...]]
    providers: Mapping[str, Function]
    reference: Function
    gpu_sizes: Sequence[dict[str, int]]
    cpu_sizes: Sequence[dict[str, int]] = ()
    directions: tuple[Direction, ...] = ("forward", "backward")
    baseline: str = "eager"  # the provider to compare errors and times with
    dtype: torch.dtype = DTYPE
    # The provider or function whose bytes and FLOPs are counted, by costs.py.
    counted: str | Function = "fused"
    # The necessary FLOPs, ``flops(direction, **sizes)``, if they differ from those of ``counted``.
    flops: Callable[..., int] | None = None
    # Sizes for ``determinism.py``, with partial tiles.
    small: dict[str, int] | None = None
    # Replaces the comparison with ``reference``: ``check(provider, function, inputs)``.
    check: Callable[[str, Function, tuple[Any, ...]], None] | None = None

    @property
    def has_gradients(self) -> bool:
        return any("backward" in direction for direction in self.directions)

    def function(self, provider: str) -> Function:
        function = self.providers[provider]
        if provider == "compile":
            return torch.compile(function, fullgraph=True, dynamic=False)
        return function

    def test(self) -> Callable[..., None]:
        """A pytest test that measures every row of this op on this machine."""
        rows = [
            Row(self, tuple(sizes.items()), direction, provider).param()
            for sizes in (self.gpu_sizes if _ON_GPU else self.cpu_sizes)
            for direction in self.directions
            for provider in self.providers
        ]

        @pytest.mark.parametrize("row", rows)
        def measure(row: Row, benchmark: Any, record_property: Any) -> None:
            row.measure(benchmark, record_property)

        return measure


def every_op() -> list[Op]:
    """The ops of all ``bench_<op>.py``."""
    paths = sorted(Path(__file__).parents[1].glob("bench_*.py"))
    modules = (importlib.import_module(f"bench.{path.stem}") for path in paths)
    return [value for module in modules for value in vars(module).values() if isinstance(value, Op)]


def left_to_torch(op: Op) -> str:
    """Why ``fastgpt.ops`` uses PyTorch for the op on this GPU; "" if it does not."""
    if not _ON_GPU:
        return ""
    if op.name in OPS_OF_TENSOR_CORES and not triton_multiplies(DEVICE):
        return "PyTorch runs this op on GPUs of compute capability below 8.0"
    return triton_refusal(DEVICE)


def why_not(op: Op, provider: str) -> str | None:
    """Why this machine cannot measure the provider of ``op``; None if it can."""
    if provider == "fused" and not _ON_GPU:
        return "the Triton kernels need a CUDA GPU: the interpreter's time is meaningless"
    if provider == "fused":
        return left_to_torch(op) or None
    if provider == "torch_ops" and _ON_GPU and not left_to_torch(op):
        return "it is for machines without CUDA"
    if provider == "fp8":
        return variants.why_not(variants.VARIANTS["fastgpt_fp8_head"], DEVICE)
    if provider == "compile":
        return variants.why_not(variants.VARIANTS["sdpa_compile"], DEVICE)
    return variants.package_why_not(provider, DEVICE) if provider in variants.PACKAGES else None


class Stopwatch:
    """A timer for pytest-benchmark that runs only inside ``time``."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    def read(self) -> float:
        """Total seconds of all calls so far."""
        return sum(self.ms) / 1e3

    def time(self, work: Callable[[], Any]) -> None:
        self.ms.append(milliseconds(work, DEVICE))


@dataclass(frozen=True, eq=False, repr=False)
class Row:
    """One figure: how long ``provider`` takes for ``op`` in one direction."""

    op: Op
    sizes: Sizes
    direction: Direction
    provider: str
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def shape(self) -> str:
        return "-".join(f"{name}{size}" for name, size in self.sizes)

    def param(self) -> Any:
        """For ``pytest.mark.parametrize``."""
        reason = why_not(self.op, self.provider)
        group = f"{self.op.name} {self.shape} {self.direction}"
        marks = [pytest.mark.benchmark(group=group, timer=self.stopwatch.read)]
        if reason is not None:
            marks.append(pytest.mark.skip(reason=f"{self.provider}: {reason}"))
        return pytest.param(self, id=f"{self.shape}-{self.direction}-{self.provider}", marks=marks)

    def measure(self, benchmark: Any, record_property: Callable[[str, Any], None]) -> None:
        """Check and time, then store the figures in ``benchmark.extra_info`` for the JSON file, and
        in the property ``figures`` for the table."""
        case = case_of(self.op, self.sizes)
        function = case.checked(self.provider)

        def setup() -> tuple[tuple[Callable[[], Any]], dict[str, Any]]:
            work = prepared(self.direction, function, case.inputs, case.out_grads)
            occupier()()
            return (work,), {}

        benchmark.pedantic(
            self.stopwatch.time, setup=setup, rounds=_ROUNDS, warmup_rounds=_WARMUP_ROUNDS
        )
        figures = self.figures(spread(self.stopwatch.ms[-_ROUNDS:]), machine_ceilings())
        benchmark.extra_info.update(figures)
        record_property("figures", figures)

    def figures(self, ms: Spread, ceilings: Ceilings | None) -> dict[str, Any]:
        """A row of the table and of the JSON file. Values that do not apply are None."""
        least = cost(self.op, self.sizes, self.direction, ceilings or DEVICES["h200"])
        return {
            "op": self.op.name,
            "shape": self.shape,
            **dict(self.sizes),
            "dtype": str(self.op.dtype).removeprefix("torch."),
            "direction": self.direction,
            "provider": self.provider,
            "baseline": self.op.baseline,
            "ms": ms.median,
            "ms_p10": ms.p10,
            "ms_p90": ms.p90,
            "bytes": least.bytes,
            "flops": least.flops,
            "gb_per_s": rate(ms, least.bytes).median / 1e9,
            "tflop_per_s": rate(ms, least.flops).median / 1e12 if least.flops else None,
            "share_of_ceiling": None if ceilings is None else least.ms / ms.median,
        }


class Case:
    """An op's inputs at one size, and the expected results."""

    def __init__(self, op: Op, sizes: Sizes) -> None:
        torch.compiler.reset()  # dynamo keeps code for a few sizes only
        torch.manual_seed(0)
        self._op = op
        self._checked: dict[str, Function] = {}
        self.inputs = op.inputs(RandomTensors(DEVICE, op.dtype), **dict(sizes))
        self.out_grads: list[Tensor] = []
        if op.has_gradients:
            self.out_grads = gradients_like(tensors_in(op.function(op.baseline)(*self.inputs)))

    def checked(self, provider: str) -> Function:
        """The provider's function. Raises AssertionError if its results are wrong."""
        if provider not in self._checked:
            function = self._op.function(provider)
            if self._op.check is None:
                self._expected.check(self._results(function))
            else:
                self._op.check(provider, function, self.inputs)
            self._checked[provider] = function
        return self._checked[provider]

    @functools.cached_property
    def _expected(self) -> Expected:
        wide = torch.float64 if self._op.dtype == torch.float32 else torch.float32
        values = self._results(self._op.reference, wide)
        baseline = self._results(self._op.function(self._op.baseline))
        return Expected.of(values, baseline, [1e-5] * len(values))

    def _results(self, function: Function, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Outputs, then gradients."""
        return results(function, self.inputs, {}, dtype, self.out_grads)


@functools.lru_cache(maxsize=1)
def case_of(op: Op, sizes: Sizes) -> Case:
    """The case, cached until the next one: rows of equal sizes are adjacent."""
    return Case(op, sizes)


def prepared(
    direction: Direction, function: Function, inputs: tuple[Any, ...], out_grads: list[Tensor]
) -> Callable[[], Any]:
    """A function that runs one direction; everything before it is already done."""
    if direction == "forward":
        return lambda: function(*inputs)
    if direction in ("inference", "update"):
        without_graph = torch.no_grad()(function)
        return lambda: without_graph(*inputs)
    leaves = [x for x in tensors_in(inputs) if x.requires_grad]
    if direction == "backward":
        outputs = tensors_in(function(*inputs))
        return lambda: torch.autograd.grad(outputs, leaves, out_grads)
    return lambda: torch.autograd.grad(tensors_in(function(*inputs)), leaves, out_grads)


def cost(op: Op, sizes: Sizes, direction: Direction, ceilings: Ceilings) -> OpTotal:
    """Bytes, FLOPs and milliseconds at the ceilings, without allocating or launching anything."""
    with fake_tensors():
        inputs = op.inputs(RandomTensors(torch.device("cpu"), op.dtype), **dict(sizes))
        function = op.counted if callable(op.counted) else op.providers[op.counted]
        grads = gradients_like(tensors_in(function(*inputs))) if op.has_gradients else []
        work = prepared(direction, function, inputs, grads)
        mode = CostMode(ceilings)
        with mode:
            work()
    total = mode.total()
    if op.flops is not None:
        total.flops = op.flops(direction, **dict(sizes))
        total.ms = ceilings.ms(total.flops, total.bytes, op.dtype.itemsize == 2)
    return total


@functools.cache
def machine_ceilings() -> Ceilings | None:
    """The measured ceilings of this GPU, cached; None without a GPU."""
    if not _ON_GPU:
        return None
    found = machine.ceilings(DEVICE)
    return Ceilings("measured", found["matmul_tflops"], found["copy_tb_per_s"])


@functools.cache
def occupier() -> Occupier:
    """The occupier shared by all rows."""
    return Occupier(DEVICE)
