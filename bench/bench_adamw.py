"""AdamW with gradient clipping by a known factor: over flat buffers with a bfloat16 copy of the
result (``fused``, ``torch_ops``), and as in nanoGPT (``eager``: a kernel scales the gradients, then
PyTorch's fused AdamW updates a list of float32 parameters).

All rows use the bytes of the flat update, also for the share of the ceiling.
"""

from functools import cached_property
from typing import Any

import torch

from bench._ops.op_bench import DEVICE, Function, Op, RandomTensors
from fastgpt.kernels import fused, reference, torch_ops

_LR, _CLIP = 6e-4, 0.5
_OPTIONS: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
_PIECE = 2**20  # elements per parameter in `eager`


class State:
    """N parameters with their gradient and moments."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.param, self.grad = (torch.randn(n, device=device) for _ in range(2))
        self.low_precision = torch.empty_like(self.param, dtype=torch.bfloat16)
        self.moments = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.step, self.lr, self.clip = (
            torch.tensor(number, device=device) for number in (0.0, _LR, _CLIP)
        )

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        params = [torch.nn.Parameter(piece) for piece in self.param.split(_PIECE)]
        for p, gradient in zip(params, self.gradients, strict=True):
            p.grad = gradient
        return torch.optim.AdamW(params, lr=_LR, fused=True, **_OPTIONS)

    @cached_property
    def gradients(self) -> list[torch.Tensor]:
        return list(self.grad.split(_PIECE))


def inputs(random: RandomTensors, N: int) -> tuple[State]:
    return (State(N, random.device),)


def flat(module: Any) -> Function:
    def update(s: State) -> None:
        tensors = s.param, s.low_precision, s.grad, *s.moments, s.step, s.lr
        module.adamw(*tensors, **_OPTIONS, clip=s.clip)

    return update


def eager(s: State) -> None:
    optimizer = s.optimizer
    torch._foreach_mul_(s.gradients, s.clip)
    optimizer.step()


def check(provider: str, function: Function, inputs: tuple[Any, ...]) -> None:
    """Raise AssertionError if an update differs from the reference's."""
    states = []
    for update in (function, flat(reference)):
        torch.manual_seed(0)
        states.append(State(10_007, DEVICE))
        update(states[-1])
    found, expected = states
    torch.testing.assert_close(found.param, expected.param, rtol=1e-6, atol=1e-7)


OP = Op(
    name="adamw",
    inputs=inputs,
    providers={"fused": flat(fused), "torch_ops": flat(torch_ops), "eager": eager},
    reference=flat(reference),
    directions=("update",),
    dtype=torch.float32,
    check=check,
    gpu_sizes=[{"N": 124_439_808}, {"N": 10_745_088}],  # GPT-2 124M; nanoGPT's character model
    cpu_sizes=[{"N": 2**20}],
)

test_adamw = OP.test()


def compiled() -> None:
    s, skip = State(4096, torch.device("cpu")), torch.zeros(())
    for low_precision in (None, s.low_precision):
        tensors = s.param, low_precision, s.grad, *s.moments, s.step, s.lr
        fused.adamw(*tensors, **_OPTIONS)
        fused.adamw(*tensors, **_OPTIONS, clip=s.clip, skip=skip)
    for dtype in (torch.bfloat16, torch.float16):
        fused.accumulate([s.grad], [s.param.to(dtype)])


COMPILED = {"adamw": compiled}
