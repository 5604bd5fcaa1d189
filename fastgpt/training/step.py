"""One update of a model: micro-batches forward and backward, clipping, the optimizer.

    step = Step(model, optimizer, device, micro_batches=8, grad_clip=1.0)
    loss = step(batches, learning_rate=6e-4)     # batches: 8 pairs x, y

On a GPU the whole of it can be replayed as one CUDA graph: the host then launches once an update
instead of once a kernel. What changes from one update to the next lies in tensors on the device:
the batches, the learning rate, the optimizer's count, and the state of PyTorch's generator, from
which each replay draws its own dropout masks.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from fastgpt.cuda_graph import Graphed
from fastgpt.training.distributed import ALONE, World
from fastgpt.training.fsdp import full_tensor
from fastgpt.training.optimizer import MasterAdamW

Batch = tuple[Tensor, Tensor]

# Where the learning rate is a float32 tensor, with a graph and without one. PyTorch's AdamW takes a
# Python number as float64, with which the updates would be others than a graph's.
_LEARNING_RATE_ON_DEVICE = ("cuda",)


class Step:
    """An update of a model, to be called once for each.

    The attribute ``not_finite``, a float32 tensor (), is 1 from the first update on whose loss or
    gradient norm was not finite: that update and all later ones are not made. Without clipping only
    the loss is looked at. The host need not read it before it logs.

    With a gradient scaler it is the scaler's business to skip updates whose gradients overflow.

    The loss of an update is the mean over all its targets that are not -1, in all micro-batches of
    all processes. Gradients are exchanged once, in the backward of the last micro-batch.

    Args:
        model: ``model(x, y)`` returns a pair, the second of which is the loss: a language model,
            what torch.compile made of one, DistributedDataParallel around either, or a model that
            FSDP2 shards.
        optimizer: ``MasterAdamW``, or PyTorch's AdamW, fused where the device is a GPU.
        device: of the model.
        micro_batches: pairs in an update, of this process.
        grad_clip: the largest norm of the gradient; 0 turns clipping off.
        autocast: the context of the forward pass; None for none.
        scaler: a gradient scaler for float16, or None.
        cuda_graph: replay the update as a CUDA graph from the fourth call on. Then every call must
            bring batches of the same shape.
        world: the processes that make the update together.

    Raises:
        ValueError: a CUDA graph is wanted on another device, by several processes, of a model that
            is compiled, or with a gradient scaler, whose updates the host decides upon.
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
        self._model = model
        self._optimizer = optimizer
        self._device = device
        self._micro_batches = micro_batches
        self._grad_clip = grad_clip
        self._autocast = nullcontext() if autocast is None else autocast
        self._scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
        self.not_finite = torch.zeros((), device=device)
        if not self._scaler.is_enabled():
            # PyTorch's fused AdamW knows the attribute from the gradient scaler.
            optimizer.found_inf = self.not_finite  # type: ignore[attr-defined]
        # What the graph reads, and the update that it captures.
        self.inputs: list[Batch] = []
        self._graphed: Graphed[Tensor] | None = None
        if cuda_graph:
            if _is_compiled(model):
                raise ValueError("cuda_graph must be False with a compiled model, got True")
            if device.type != "cuda":
                raise ValueError(f"cuda_graph must be False on {device.type}, got True")
            if self._scaler.is_enabled():
                raise ValueError("cuda_graph must be False with a gradient scaler, got True")
            if world.size > 1:
                raise ValueError(f"cuda_graph must be False in {world.size} processes, got True")
            self._graphed = Graphed(lambda: self._update(self.inputs), device)

    def __call__(self, batches: Iterable[Batch], learning_rate: float) -> Tensor:
        """Make one update; the mean loss of its batches, on the device.

        Raises:
            ValueError: there are more or fewer batches than ``micro_batches``, or with a CUDA graph
                one of another shape than before.
        """
        batches = list(batches)
        if len(batches) != self._micro_batches:
            raise ValueError(f"batches must hold {self._micro_batches} pairs, got {len(batches)}")
        self._set_learning_rate(learning_rate)
        if self._graphed is None:
            return self._update(batches)
        self._bring(batches)
        return self._graphed().clone()  # the next replay writes to the same tensor

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            if self._device.type in _LEARNING_RATE_ON_DEVICE and not isinstance(
                group["lr"], Tensor
            ):
                group["lr"] = torch.empty((), dtype=torch.float32, device=self._device)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate

    def _bring(self, batches: list[Batch]) -> None:
        """Copy the batches to where the graph reads them."""
        if not self.inputs:
            self.inputs = [(torch.empty_like(x), torch.empty_like(y)) for x, y in batches]
        for batch, mine in zip(batches, self.inputs, strict=True):
            for source, target in zip(batch, mine, strict=True):
                if source.shape != target.shape:
                    raise ValueError(
                        f"every batch of a CUDA graph must have the shape {tuple(target.shape)}, "
                        f"got {tuple(source.shape)}"
                    )
                target.copy_(source)

    def _update(self, batches: list[Batch]) -> Tensor:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            for group in self._optimizer.param_groups:
                group["capturable"] = True  # PyTorch demands it in a capture, and warns elsewhere
        valid = torch.stack([(y != -1).sum() for _, y in batches])
        all_valid = self._world.all_reduce(valid.sum())
        total = torch.zeros((), device=self._device)
        for number, (x, y) in enumerate(batches):
            last = number == len(batches) - 1
            with self._gradient_sync(last):
                with self._autocast:
                    loss = self._part_of_mean(self._model(x, y)[1], valid[number], all_valid)
                self._scaler.scale(loss).backward()
            total += loss.detach()
        total = self._world.all_reduce(total) / self._world.size
        self._note_if_not_finite(total)
        if self._grad_clip != 0.0:
            self._scaler.unscale_(self._optimizer)
            norm = self._clip()
            if not self._scaler.is_enabled():  # which expects overflows and skips them itself
                self._note_if_not_finite(norm)
        # Off CUDA nothing runs ahead: the host may look, and not every AdamW knows found_inf there.
        if self._device.type == "cuda" or not self.not_finite:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _part_of_mean(self, loss: Tensor, valid: Tensor, all_valid: Tensor) -> Tensor:
        """What a micro-batch's mean ``loss`` adds to the update's, times the number of processes,
        over which gradients are averaged. NaN, as ``loss`` is, if there is no valid target at all.
        """
        share = loss / (all_valid / (valid * self._world.size))
        return torch.where((valid > 0) | (all_valid == 0), share, 0.0)

    def _gradient_sync(self, gradients: bool) -> AbstractContextManager[object]:
        if isinstance(self._model, FSDPModule):
            self._model.set_requires_gradient_sync(gradients)
        if gradients or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()

    def _clip(self) -> Tensor:
        if isinstance(self._optimizer, MasterAdamW):
            return self._optimizer.clip_grad_norm_(self._grad_clip)
        return full_tensor(nn.utils.clip_grad_norm_(self._model.parameters(), self._grad_clip))

    def _note_if_not_finite(self, value: Tensor) -> None:
        torch.maximum(self.not_finite, (~value.isfinite()).float(), out=self.not_finite)


def _is_compiled(model: nn.Module) -> bool:
    """By torch.compile, which wraps a module, or by its method of that name."""
    return hasattr(model, "_orig_mod") or model._compiled_call_impl is not None
