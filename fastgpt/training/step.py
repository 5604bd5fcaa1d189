"""One update of a model: micro-batches forward and backward, clipping, the optimizer.

    step = Step(model, optimizer, device, micro_batches=8, grad_clip=1.0)
    loss = step(batches, learning_rate=6e-4)     # batches: 8 pairs x, y

On a GPU the whole update can be replayed as one CUDA graph. In a distributed run the graph covers
forward and backward of all micro-batches, without the collectives. Whatever changes between updates
is in tensors on the device: the batches, the learning rate, the optimizer's step count, and the
state of PyTorch's generator, from which each replay draws new dropout masks.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgpt.cuda_graph import Graphed
from fastgpt.data.batches import Batch
from fastgpt.training.distributed import ALONE, World
from fastgpt.training.optimizer import MasterAdamW

# Devices on which the learning rate is a float32 tensor, with and without a graph. PyTorch's AdamW
# uses a Python number as float64, so updates would differ from those of a graph.
_LEARNING_RATE_ON_DEVICE = ("cuda",)


class Step:
    """Makes one update of a model per call.

    The loss of an update is the mean over all targets that are not -1, in all micro-batches of all
    processes. Gradients are all-reduced once: by ``MasterAdamW`` after the last micro-batch, by
    DistributedDataParallel and FSDP2 during its backward.

    Attributes:
        not_finite: a float32 tensor (), set to 1 by the first update whose loss or gradient norm is
            not finite. That update and all later ones are skipped, so the host need not read it
            before it logs. Without clipping only the loss is checked; the same with a gradient
            scaler, which itself skips updates whose gradients overflow.
        inputs: for each micro-batch the pair of tensors that a CUDA graph reads; None before the
            first call and without a graph. A batch passed as that pair is not copied again.

    Args:
        model: ``model(x, y)`` returns a pair whose second element is the loss. A language model,
            compiled or not, optionally in DistributedDataParallel, or a model sharded by FSDP2.
        optimizer: ``MasterAdamW`` or PyTorch's AdamW, which must be fused on a GPU.
        device: the model's device.
        micro_batches: batches per update in this process.
        grad_clip: maximum gradient norm; 0 disables clipping.
        autocast: context of the forward pass, or None.
        scaler: a gradient scaler for float16, or None.
        cuda_graph: replay the update as a CUDA graph from the fourth call on. All calls must then
            pass batches of the same shape.
        world: the processes that make the update together.

    Raises:
        ValueError: ``cuda_graph`` is set on a device other than CUDA, in several processes without
            ``MasterAdamW``, with a compiled model, or with a gradient scaler, where the host
            decides whether to update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        micro_batches: int = 1,
        grad_clip: float = 0.0,
        autocast: AbstractContextManager[object] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        cuda_graph: bool = False,
        world: World = ALONE,
    ) -> None:
        self._world = world
        # MasterAdamW sums the gradients of all processes, the others take their mean.
        self._has_masters = isinstance(optimizer, MasterAdamW)
        self._divisor = 1 if self._has_masters else world.size
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._grad_clip = grad_clip
        self._autocast = nullcontext() if autocast is None else autocast
        self._scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self.inputs: list[Batch | None] = [None] * micro_batches
        self.not_finite = torch.zeros((), device=device)
        if not self._scaler.is_enabled():
            # PyTorch's fused AdamW skips the update if this is 1, as a gradient scaler sets it.
            optimizer.found_inf = self.not_finite  # type: ignore[attr-defined]
        self._counts: tuple[Tensor, Tensor] | None = None  # read by the graph
        self._graphed: Graphed[Tensor] | None = None
        if cuda_graph:
            for where, unsupported in {
                "with a compiled model": _is_compiled(model),
                f"on {device.type}": device.type != "cuda",
                "with a gradient scaler": self._scaler.is_enabled(),
                f"in {world.size} processes": world.size > 1 and not self._has_masters,
            }.items():
                if unsupported:
                    raise ValueError(f"cuda_graph must be False {where}, got True")
            several = world.size > 1
            self._graphed = Graphed(
                self._accumulate_inputs if several else self._update_with_inputs, device
            )

    def __call__(self, batches: Iterable[Batch], learning_rate: float) -> Tensor:
        """Make one update; return the mean loss of its batches, on the device.

        Raises:
            ValueError: the number of batches is not ``micro_batches``, or with a CUDA graph the
                shape of a batch differs from earlier ones.
        """
        batches = list(batches)
        if len(batches) != len(self.inputs):
            raise ValueError(f"batches must hold {len(self.inputs)} pairs, got {len(batches)}")
        self._set_learning_rate(learning_rate)
        if self._graphed is None:
            return self._update(batches)
        self._copy_to_inputs(batches)
        if self._world.size > 1:
            self._copy_to_counts(self._counted(batches))
            return self._finish(self._graphed().clone())
        return self._graphed().clone()  # the next replay writes to the same tensor

    def _set_learning_rate(self, learning_rate: float) -> None:
        on_device = self._device.type in _LEARNING_RATE_ON_DEVICE
        for group in self._optimizer.param_groups:
            if on_device and not isinstance(group["lr"], Tensor):
                group["lr"] = torch.empty((), dtype=torch.float32, device=self._device)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate

    def _copy_to_inputs(self, batches: list[Batch]) -> None:
        for number, batch in enumerate(batches):
            pair = self.inputs[number] or (torch.empty_like(batch[0]), torch.empty_like(batch[1]))
            self.inputs[number] = pair
            if batch is pair:
                continue
            for source, target in zip(batch, pair, strict=True):
                if source.shape != target.shape:
                    raise ValueError(
                        f"every batch of a CUDA graph must have the shape {tuple(target.shape)}, "
                        f"got {tuple(source.shape)}"
                    )
                target.copy_(source)

    def _copy_to_counts(self, counts: tuple[Tensor, Tensor]) -> None:
        if self._counts is None:
            self._counts = counts
            return
        for target, count in zip(self._counts, counts, strict=True):
            target.copy_(count)

    def _inputs(self) -> list[Batch]:
        return [batch for batch in self.inputs if batch is not None]

    def _update_with_inputs(self) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            for group in self._optimizer.param_groups:
                group["capturable"] = True  # required during a capture, a warning outside of it
        return self._update(self._inputs())

    def _accumulate_inputs(self) -> Tensor:
        assert self._counts is not None
        # Before the backward, not after the update: a replay runs no Python, so the optimizer's
        # record of which gradients exist must stay as the capture left it.
        self._optimizer.zero_grad()
        return self._accumulated(self._inputs(), *self._counts)

    def _update(self, batches: list[Batch]) -> Tensor:
        total = self._finish(self._accumulated(batches, *self._counted(batches)))
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _counted(self, batches: list[Batch]) -> tuple[Tensor, Tensor]:
        """The valid targets of each micro-batch (micro_batches,), and of the update ()."""
        n_valid = torch.stack([(y != -1).sum() for _, y in batches])
        return n_valid, self._world.all_reduce(n_valid.sum())

    def _accumulated(self, batches: list[Batch], n_valid: Tensor, all_valid: Tensor) -> Tensor:
        """Forward and backward of all micro-batches. Returns this process's part of the loss."""
        total = torch.zeros((), device=self._device)
        for number, (x, y) in enumerate(batches):
            with self._gradient_sync(number == len(batches) - 1):
                with self._autocast:
                    loss = self._weighted(self._model(x, y)[1], n_valid[number], all_valid)
                self._scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def _finish(self, total: Tensor) -> Tensor:
        """Clip and update with the accumulated gradients. Returns the loss over all processes."""
        total = self._world.all_reduce(total) / self._divisor
        self._check_finite(total)
        if self._grad_clip != 0.0:
            self._scaler.unscale_(self._optimizer)
            norm = self._clip()
            if not self._scaler.is_enabled():
                self._check_finite(norm)
        # On other devices not every AdamW supports found_inf, but there the host may read the flag.
        if self._device.type == "cuda" or not self.not_finite:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        return total

    def _weighted(self, loss: Tensor, n_valid: Tensor, all_valid: Tensor) -> Tensor:
        """A micro-batch's mean ``loss``, weighted by its share of the update's targets, and times
        the number of processes if gradients are averaged over them. NaN, like ``loss``, if the
        update has no valid target at all.
        """
        weighted = loss / (all_valid / (n_valid * self._divisor))
        return torch.where((n_valid > 0) | (all_valid == 0), weighted, 0.0)

    def _gradient_sync(self, enabled: bool) -> AbstractContextManager[object]:
        """A context whose backward all-reduces gradients if ``enabled``, else only adds them."""
        # Detect FSDP2 by its methods: importing it takes half as long as importing PyTorch itself.
        sharded: Any = self._model
        if hasattr(sharded, "set_requires_gradient_sync"):
            sharded.set_requires_gradient_sync(enabled)
        if enabled or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()

    def _clip(self) -> Tensor:
        if isinstance(self._optimizer, MasterAdamW):
            return self._optimizer.clip_grad_norm_(self._grad_clip)
        norm: Any = nn.utils.clip_grad_norm_(self._model.parameters(), self._grad_clip)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _check_finite(self, value: Tensor) -> None:
        torch.maximum(self.not_finite, (~value.isfinite()).float(), out=self.not_finite)


def _is_compiled(model: nn.Module) -> bool:
    """Whether the model was compiled by torch.compile or its method ``compile``."""
    return hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
