"""AdamW with float32 master weights, for a model whose matrices are in half precision.

    optimizer = MasterAdamW(model, torch.bfloat16, weight_decay=0.1, learning_rate=6e-4,
                            betas=(0.9, 0.95))
    loss.backward()                      # any number of times; gradients accumulate in float32
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()

Master weights, moments and gradients are flat float32 buffers, one set for the parameters with
weight decay and one for those without, so that an update is one kernel (``ops.adamw``) per set. The
model's parameters become views: those in half precision of a low-precision copy, the others of the
master weights. There is no host synchronization: learning rate, step count and clipping factor are
tensors on the device.

In a distributed run the gradient buffers are all-reduced before an update, in float32 and with one
collective per set. ``DistributedDataParallel`` would reduce gradients in half precision.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.language_model import Trainable
from fastgpt.training.distributed import ALONE, World

# Alignment of each parameter's start, in elements: a multiple of 16 bytes, which the GEMMs' copies
# need, and of a cache line.
_ALIGNMENT = 128


def flat_size(params: Iterable[Tensor]) -> int:
    """Number of elements of a flat buffer of these parameters."""
    return sum(_padded_size(p) for p in params)


def _padded_size(p: Tensor) -> int:
    return -(-p.numel() // _ALIGNMENT) * _ALIGNMENT


class _Group:
    """The flat buffers of one parameter group."""

    def __init__(
        self,
        params: list[nn.Parameter],
        rounded: set[nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
        world: World,
    ) -> None:
        self.params = params
        self._starts = [0, *itertools.accumulate(map(_padded_size, params))][:-1]
        size = flat_size(params)
        self.master, self.grad, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(size, device=device) for _ in range(4)
        )
        self.rounded = torch.zeros(size, dtype=dtype, device=device)
        self.step = torch.zeros((), device=device)
        for p, master in zip(params, self.views(self.master), strict=True):
            master.copy_(p.data)
        world.broadcast(self.master)
        self.rounded.copy_(self.master)
        views = zip(params, self.views(self.rounded), self.views(self.master), strict=True)
        for p, low, high in views:
            p.data = low if p in rounded else high

    def views(self, flat: Tensor) -> list[Tensor]:
        """A view of each parameter's part, in the parameter's shape."""
        return [
            flat[start : start + p.numel()].view_as(p)
            for start, p in zip(self._starts, self.params, strict=True)
        ]

    def moments(self) -> list[dict[str, Tensor]]:
        """Views of each parameter's two moments, under AdamW's names."""
        first, second = self.views(self.exp_avg), self.views(self.exp_avg_sq)
        return [{"exp_avg": a, "exp_avg_sq": b} for a, b in zip(first, second, strict=True)]


class MasterAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) on float32 master copies of the model's parameters.

    The constructor casts ``model.low_precision_parameters()`` to ``dtype``; the others stay
    float32, and ``master_state_dict`` has all of them in float32. Groups, order and state are those
    of ``model.configure_optimizers``: a ``state_dict`` of either loads into the other.

    ``p.grad`` stays None: gradients are added to a float32 buffer, all at once when every parameter
    has one, or when they are needed. ``param_groups[i]["lr"]`` is a tensor on the device. ``step``
    changes nothing while the attribute ``found_inf``, a tensor (), is not 0.

    Args:
        model: on its device, in float32.
        dtype: torch.bfloat16 or torch.float16.
        weight_decay, learning_rate, betas: as in ``configure_optimizers``.
        world: the processes that make every update together, each with its own copy of the model
            and its own batches. All start with the weights of rank 0. ``clip_grad_norm_`` and
            ``step`` are collective and sum the gradients of all ranks.

    Raises:
        TypeError: ``dtype`` is neither, or a parameter is not float32.
        RuntimeError: in a distributed run, backward is called between ``clip_grad_norm_`` and
            ``step``.
    """

    def __init__(
        self,
        model: Trainable,
        dtype: torch.dtype,
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
        world: World = ALONE,
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
        for name, p in model.named_parameters():
            if p.dtype != torch.float32:
                raise TypeError(f"{name} must be float32 before the master copy, got {p.dtype}")
        rounded = set(model.low_precision_parameters())
        plan = model.configure_optimizers(weight_decay, learning_rate, betas, "cpu").param_groups
        device = next(model.parameters()).device
        self._groups = [_Group(group["params"], rounded, dtype, device, world) for group in plan]
        self._model = model
        self._world = world
        self._is_summed = False  # whether the gradients are summed over the processes
        self._clip: Tensor | None = None
        self._has_grad: set[nn.Parameter] = set()
        self._totals: dict[nn.Parameter, Tensor] = {}
        self._waiting: dict[nn.Parameter, Tensor] = {}  # gradients not yet in the totals
        self.found_inf: Tensor | None = None
        masters = [
            {
                "params": [nn.Parameter(view) for view in group.views(group.master)],
                "weight_decay": options["weight_decay"],
                "lr": torch.tensor(learning_rate, device=device),
            }
            for group, options in zip(self._groups, plan, strict=True)
        ]
        super().__init__(masters, lr=learning_rate, betas=betas, eps=1e-8, fused=True)
        for group, options in zip(self._groups, self.param_groups, strict=True):
            for p, moments in zip(options["params"], group.moments(), strict=True):
                self.state[p] = {"step": group.step, **moments}
            for p, grad in zip(group.params, group.views(group.grad), strict=True):
                self._totals[p] = grad
                p.register_post_accumulate_grad_hook(self._take)

    def _take(self, p: Tensor) -> None:
        """Called when a backward pass has accumulated ``p.grad``."""
        assert p.grad is not None and isinstance(p, nn.Parameter)
        if self._is_summed:
            raise RuntimeError(
                "in a distributed run backward must not be called between clip_grad_norm_ and "
                "step: the gradients of all processes are already summed"
            )
        if p in self._waiting:
            self._add_waiting()
        self._waiting[p] = p.grad
        p.grad = None
        if len(self._waiting) == len(self._totals):
            self._add_waiting()

    @torch.no_grad()
    def _add_waiting(self) -> None:
        """Add the waiting gradients to the totals, in one or two launches per dtype."""
        for dtype in {grad.dtype for grad in self._waiting.values()}:
            grads = {p: grad for p, grad in self._waiting.items() if grad.dtype == dtype}
            for add, ps in (
                (torch._foreach_copy_, [p for p in grads if p not in self._has_grad]),
                (ops.accumulate, [p for p in grads if p in self._has_grad]),
            ):
                if ps:
                    add([self._totals[p] for p in ps], [grads[p] for p in ps])
        self._has_grad.update(self._waiting)
        self._waiting.clear()

    @torch.no_grad()
    def _complete_gradients(self) -> None:
        """Set the gradients of parameters without a backward pass since ``zero_grad`` to 0, then
        sum the gradients of all processes, once."""
        self._add_waiting()
        for p, total in self._totals.items():
            if p not in self._has_grad:
                total.zero_()
                self._has_grad.add(p)
        if self._world.size > 1 and not self._is_summed:
            for group in self._groups:
                self._world.all_reduce(group.grad)
            self._is_summed = True

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Return the norm of all gradients; the next ``step`` scales them to ``max_norm`` if it is
        larger. Like ``torch.nn.utils.clip_grad_norm_``, but does not change the gradients.
        """
        self._complete_gradients()
        norms = torch.stack([torch.linalg.vector_norm(group.grad) for group in self._groups])
        norm = torch.linalg.vector_norm(norms)
        self._clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one update with the gradients since ``zero_grad``."""
        self._complete_gradients()
        for group, options in zip(self._groups, self.param_groups, strict=True):
            ops.adamw(
                group.master,
                group.rounded,
                group.grad,
                group.exp_avg,
                group.exp_avg_sq,
                group.step,
                options["lr"],
                betas=options["betas"],
                eps=options["eps"],
                weight_decay=options["weight_decay"],
                clip=self._clip,
                skip=self.found_inf,
            )
        self._is_summed = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard the gradients; the next backward pass overwrites the buffers."""
        self._has_grad.clear()
        self._waiting.clear()
        self._clip, self._is_summed = None, False

    def master_state_dict(self) -> dict[str, Tensor]:
        """The model's ``state_dict`` in float32."""
        masters: dict[Tensor, Tensor] = {}
        for group in self._groups:
            masters.update(zip(group.params, group.views(group.master), strict=True))
        return {
            name: masters[value] if value in masters else value
            for name, value in self._model.state_dict(keep_vars=True).items()
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load moments and counts from a ``state_dict`` of this class, or of the AdamW that
        ``configure_optimizers`` returns. Options and learning rate are kept.

        Raises:
            KeyError: a moment or count is missing.
            ValueError: it belongs to other parameters.
        """
        numbers = [len(group["params"]) for group in state_dict["param_groups"]]
        own = [len(group.params) for group in self._groups]
        if numbers != own:
            raise ValueError(f"state_dict must have {own} parameters in its groups, got {numbers}")
        state = state_dict["state"]
        for group, saved in zip(self._groups, state_dict["param_groups"], strict=True):
            for index, moments in zip(saved["params"], group.moments(), strict=True):
                found = state[index]
                for name, target in moments.items():
                    if found[name].shape != target.shape:
                        raise ValueError(
                            f"{name} of parameter {index} must have shape {tuple(target.shape)}, "
                            f"got {tuple(found[name].shape)}"
                        )
                    target.copy_(found[name])
                group.step.fill_(float(found["step"]))


def saved_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` in a form that any run can load, including nanoGPT's: the learning
    rate as a number, and without ``capturable``, which only a CUDA graph needs."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(lr=float(group["lr"]), capturable=False)
    return state
