"""Whether a matrix product with an epilogue of ours pays: rows for the files ``bench_<op>.py``.

    pytest -n0 bench -k "Triton or cuBLAS"

A product is taken in three ways: by cuBLAS ``ALONE``, with nothing done to its result, which no
epilogue can beat by much; by cuBLAS with the rest as kernels of their own (``SEPARATE``), which is
what a launch table gets by saying None; and by the Triton kernel that its launch table names
(``FUSED``). Before it is timed, ``FUSED`` is compared with the plain op in float32: it may err
twice as much as ``SEPARATE``, plus 1e-5. The table's last column is FUSED's time over SEPARATE's,
and which of the two the launch table should say.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from bench._harness.timing import Spread
from bench._ops import op_bench
from bench._ops.op_bench import DEVICE, DTYPE, Draw, Sizes, Stopwatch, timed
from bench._ops.op_report import ALONE, FUSED, SEPARATE
from bench._roofline.ceilings import Ceilings
from fastgpt.kernels import _host, configs
from fastgpt.kernels.configs import CUBLAS
from fastgpt.kernels.costs import nbytes

Results = tuple[Tensor, ...]
Way = Callable[..., Results]  # of the inputs


def configured(table: str) -> Any:
    """What ``configs`` says for a product on this machine."""
    kernel, *options = table.split("_")
    capability = _host.capability(DEVICE)
    return configs.lookup("gemm", kernel, capability, DTYPE, configs.ANY, tuple(options))


@dataclass(frozen=True, eq=False)
class Product:
    """One or more matrix products of an op, and what comes right behind them.

    ``inputs(draw, **sizes)``: what all ways take. ``flops(**sizes)``: of the matrix products.
    ``plain``: the same in PyTorch, in any dtype. ``table``: kernel and option in ``configs``, if it
    is there. ``gpu_sizes``: as of the op.
    """

    op: str
    name: str
    inputs: Callable[..., tuple[Tensor, ...]]
    flops: Callable[..., int]
    plain: Way
    ways: Mapping[str, Way]
    gpu_sizes: Sequence[dict[str, int]]
    table: str | None = None
    cpu_sizes: Sequence[dict[str, int]] = ()

    def why_not(self, way: str) -> str | None:
        """Why this machine has no such way; None if it has."""
        if DEVICE.type != "cuda":
            return "cuBLAS and the Triton kernels need a CUDA GPU"
        if way == FUSED and self.table is not None and configured(self.table) == CUBLAS:
            return "the launch table says cuBLAS"
        return None


@dataclass(frozen=True, eq=False, repr=False)
class Row:
    """One figure: how long a product takes in one way."""

    op: Product
    sizes: Sizes
    provider: str  # ALONE, SEPARATE or FUSED
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def __repr__(self) -> str:
        return f"{self.op.op} {self.shape} {self.op.name} {self.provider}"

    @property
    def shape(self) -> str:
        return op_bench.shape(self.sizes)

    def param(self) -> Any:
        """For ``pytest.mark.parametrize``."""
        reason = self.op.why_not(self.provider)
        group = f"{self.op.op} {self.shape} {self.op.name}"
        marks = [pytest.mark.benchmark(group=group, timer=self.stopwatch.read)]
        if reason is not None:
            marks.append(pytest.mark.skip(reason=f"{self.provider}: {reason}"))
        return pytest.param(self, id=f"{self.shape}-{self.op.name}-{self.provider}", marks=marks)

    def measure(self, benchmark: Any, record_property: Callable[[str, Any], None]) -> None:
        """As ``_op_bench.Row.measure``."""
        inputs = drawn(self.op, self.sizes)
        results = check(self.op, inputs) if self.provider == FUSED else ()
        moved = nbytes(*inputs, *(results or self.op.ways[SEPARATE](*inputs)))
        del results
        way = self.op.ways[self.provider]
        ms = timed(benchmark, self.stopwatch, lambda: lambda: way(*inputs))
        figures = self.figures(ms, moved, op_bench.machine_ceilings())
        benchmark.extra_info.update(figures)
        record_property("figures", figures)

    def figures(self, ms: Spread, moved: int, ceilings: Ceilings | None) -> dict[str, Any]:
        """What is known of the row when it took ``ms``. ``moved``: bytes that have to be."""
        flops = self.op.flops(**dict(self.sizes))
        return op_bench.figures(
            f"{self.op.op} products",
            self.sizes,
            self.op.name,
            self.provider,
            ms,
            moved,
            flops,
            ceilings.ms(flops, moved, DTYPE.itemsize == 2) if ceilings else None,
        )


def rows(*products: Product) -> pytest.MarkDecorator:
    """Parametrizes a test with ``row``, every row of these products."""
    return pytest.mark.parametrize(
        "row",
        [
            Row(product, tuple(sizes.items()), way).param()
            for product in products
            for sizes in product.gpu_sizes
            for way in (ALONE, SEPARATE, FUSED)
        ],
    )


def drawn(product: Product, sizes: Sizes) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(x.detach() for x in product.inputs(Draw(DEVICE, DTYPE), **dict(sizes)))


def check(product: Product, inputs: tuple[Tensor, ...]) -> Results:
    """What FUSED finds; AssertionError where it errs too much."""
    wide = torch.float64 if DTYPE == torch.float32 else torch.float32
    truth = product.plain(*(x.to(wide) if x.is_floating_point() else x for x in inputs))
    separate, fused = (product.ways[way](*inputs) for way in (SEPARATE, FUSED))
    for number, (ours, theirs, right) in enumerate(zip(fused, separate, truth, strict=True)):
        error, allowed = (
            float((x.to(wide) - right).square().mean().sqrt()) for x in (ours, theirs)
        )
        assert error <= 2 * allowed + 1e-5, (
            f"{product.op}, {product.name}: result {number} has an RMS error of {error:.3g}, "
            f"that of cuBLAS and a pass is {allowed:.3g}"
        )
    return fused
