"""When each block is reached and when each gradient is there, in one micro-batch on one GPU:
forward and backward run once on fake tensors, and the clock is the roofline's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import torch
from _ceilings import Ceilings
from _dispatch import CostMode, LiveMemory
from _fake_model import fake_model
from torch import Tensor, nn

from fastgpt import GPT, GPTConfig


@dataclass(frozen=True)
class Gradient:
    name: str
    shape: tuple[int, ...]
    itemsize: int
    ready_ms: float  # since the backward began

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Timeline:
    """One micro-batch on one GPU, in ms. ``forward``: the embedding, every block, the loss;
    ``backward``: the loss, every block from the last one on, the embedding. The gradients stand in
    the order in which they are ready."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    gradients: tuple[Gradient, ...]

    @property
    def ms(self) -> float:
        return sum(self.forward) + sum(self.backward)

    @property
    def numel(self) -> int:
        return sum(gradient.numel for gradient in self.gradients)


def timeline(
    config: GPTConfig, batch_size: int, params: str, ceilings: Ceilings, recompute: bool = False
) -> Timeline:
    """Forward and backward of ``GPT`` on the fused ops, with bfloat16 products; ``params`` as in
    ``roofline.Options``."""
    with fake_model(config, getattr(torch, params), recompute) as gpt:
        idx = torch.empty(batch_size, config.block_size, dtype=torch.int64)
        clock = _Clock(gpt, ceilings)
        with clock.mode:
            with torch.autocast("cpu", torch.bfloat16, enabled=params != "bfloat16"):
                loss = gpt(idx, idx)[1]
            assert loss is not None
            middle = clock.ms()
            loss.backward()
            end = clock.ms()
    blocks = range(config.n_layer)
    return Timeline(
        _durations([0.0, *(clock.entered[i] for i in blocks), clock.left, middle]),
        _durations([middle, clock.returned, *(clock.passed[i] for i in reversed(blocks)), end]),
        tuple(replace(gradient, ready_ms=gradient.ready_ms - middle) for gradient in clock.ready),
    )


class _Clock:
    """The roofline's time at which a model's blocks and gradients are reached."""

    def __init__(self, gpt: GPT, ceilings: Ceilings) -> None:
        self.mode = CostMode(ceilings, LiveMemory())
        self.entered: dict[int, float] = {}  # each block, forward
        self.left = self.returned = 0.0  # the last one: forward; by the gradient of its output
        self.passed: dict[int, float] = {}  # each block, by the gradients of both its inputs
        self.ready: list[Gradient] = []
        blocks = gpt.transformer.h
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._enter, number))
        blocks[-1].register_forward_hook(self._leave)
        for name, p in gpt.named_parameters():
            p.register_post_accumulate_grad_hook(partial(self._accumulated, name))

    def ms(self) -> float:
        return sum(op.ms for op in self.mode.ops.values())

    def _enter(self, number: int, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.entered[number] = self.ms()

        def passed(grad: Tensor) -> None:
            self.passed[number] = self.ms()  # what comes later counts

        for x in inputs[:2]:  # the normalised input, and the residual
            x.register_hook(passed)

    def _leave(self, block: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        self.left = self.ms()

        def returned(grad: Tensor) -> None:
            self.returned = self.ms()

        output[0].register_hook(returned)  # nobody asks for the residual behind the last block

    def _accumulated(self, name: str, p: Tensor) -> None:
        self.ready.append(Gradient(name, tuple(p.shape), p.itemsize, self.ms()))


def _durations(times: Sequence[float]) -> tuple[float, ...]:
    return tuple(after - before for before, after in pairwise(times))
