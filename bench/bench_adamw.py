"""AdamW, clipping by a known factor included: over flat buffers with a bfloat16 copy of the result
(``fused``, ``torch_ops``), and as nanoGPT calls it (``eager``: PyTorch's fused AdamW over the
parameters one by one, float32 alone, the gradients scaled by a kernel before it).

Bytes and share of the ceiling are those of the flat update for all. Before it is timed, the result
of one update is compared with the plain op in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench._ops import op_bench
from bench._ops.op_bench import DEVICE, Sizes, Stopwatch, timed
from fastgpt.kernels import fused, reference, torch_ops

_LR, _BETAS, _EPS, _WEIGHT_DECAY, _CLIP = 6e-4, (0.9, 0.95), 1e-8, 0.1, 0.5
_PIECE = 2**20  # numbers of a parameter in `eager`
_BYTES = 30  # per number: parameter, gradient and two moments in; three of them out, and the copy

SIZES = [{"N": 124_439_808}, {"N": 10_745_088}]  # GPT-2 124M; nanoGPT's character model
CPU_SIZES = [{"N": 2**20}]


class State:
    """Parameters and moments of N numbers, and their gradient."""

    def __init__(self, n: int) -> None:
        torch.manual_seed(0)
        self.param, self.grad = (torch.randn(n, device=DEVICE) for _ in range(2))
        self.rounded = torch.empty_like(self.param, dtype=torch.bfloat16)
        self.exp_avg = torch.zeros_like(self.param)
        self.exp_avg_sq = torch.zeros_like(self.param)
        self.step, self.lr, self.clip = (
            torch.tensor(number, device=DEVICE) for number in (0.0, _LR, _CLIP)
        )

    def flat(self, module: Any) -> Callable[[], None]:
        return lambda: module.adamw(
            self.param,
            self.rounded,
            self.grad,
            self.exp_avg,
            self.exp_avg_sq,
            self.step,
            self.lr,
            betas=_BETAS,
            eps=_EPS,
            weight_decay=_WEIGHT_DECAY,
            clip=self.clip,
        )

    def eager(self) -> Callable[[], None]:
        params = [torch.nn.Parameter(piece) for piece in self.param.split(_PIECE)]
        gradients = list(self.grad.split(_PIECE))
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer = torch.optim.AdamW(
            params, lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_WEIGHT_DECAY, fused=True
        )

        def update() -> None:
            torch._foreach_mul_(gradients, self.clip)
            optimizer.step()

        return update


def work(state: State, provider: str) -> Callable[[], None]:
    if provider == "eager":
        return state.eager()
    return state.flat(fused if provider == "fused" else torch_ops)


def check(provider: str) -> None:
    """AssertionError where an update is not the plain op's."""
    found, expected = State(10_007), State(10_007)
    work(found, provider)()
    expected.flat(reference)()
    torch.testing.assert_close(found.param, expected.param, rtol=1e-6, atol=1e-7)


@dataclass(frozen=True, eq=False, repr=False)
class Row:
    sizes: Sizes
    provider: str
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    def param(self) -> Any:
        shape = op_bench.shape(self.sizes)
        marks = [pytest.mark.benchmark(group=f"adamw {shape}", timer=self.stopwatch.read)]
        if (reason := op_bench.why_not(self.provider)) is not None:
            marks.append(pytest.mark.skip(reason=f"{self.provider}: {reason}"))
        return pytest.param(self, id=f"{shape}-{self.provider}", marks=marks)

    def measure(self, benchmark: Any, record_property: Callable[[str, Any], None]) -> None:
        check(self.provider)
        (_, n), *_ = self.sizes
        state = State(n)
        update = work(state, self.provider)
        ms = timed(benchmark, self.stopwatch, lambda: update)
        ceilings = op_bench.machine_ceilings()
        figures = op_bench.figures(
            "adamw",
            self.sizes,
            "update",
            self.provider,
            ms,
            _BYTES * n,
            0,
            ceilings.ms(0, _BYTES * n, half=False) if ceilings else None,
        )
        figures["dtype"] = "float32"
        benchmark.extra_info.update(figures)
        record_property("figures", figures)


@pytest.mark.parametrize(
    "row",
    [
        Row(tuple(sizes.items()), provider).param()
        for sizes in (SIZES if DEVICE.type == "cuda" else CPU_SIZES)
        for provider in ("fused", "torch_ops", "eager")
    ],
)
def test_adamw(row: Row, benchmark: Any, record_property: Any) -> None:
    row.measure(benchmark, record_property)
