"""AdamW for a model whose matrices are held in half precision, over float32 master weights.

    optimizer = MasterAdamW(model, torch.bfloat16, weight_decay=0.1, learning_rate=6e-4,
                            betas=(0.9, 0.95))
    loss.backward()                      # any number of times; gradients add up in float32
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()

Master weights, moments and gradients lie in flat float32 buffers, one of each for the parameters
that are decayed and for those that are not, so that an update is one kernel (``ops.adamw``). The
model's parameters become views: of a rounded copy those that the matrix products would round
anyway, of the master weights themselves the others. Nothing here waits for the device: learning
rate, count and clipping factor are tensors on it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.language_model import LanguageModel

_ALIGNMENT = 128  # elements between the beginnings of two parameters: a multiple of 16 bytes, which
# the GEMMs' copies need, and of a cache line


class _Group:
    """The flat buffers of the parameters that share their options."""

    def __init__(
        self,
        params: list[nn.Parameter],
        rounded: set[nn.Parameter],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.params = params
        self._starts: list[int] = []
        size = 0
        for p in params:
            self._starts.append(size)
            size += -(-p.numel() // _ALIGNMENT) * _ALIGNMENT
        self.master, self.grad, self.exp_avg, self.exp_avg_sq = (
            torch.zeros(size, device=device) for _ in range(4)
        )
        self.rounded = torch.zeros(size, dtype=dtype, device=device)
        self.step = torch.zeros((), device=device)
        for p, master in zip(params, self.views(self.master), strict=True):
            master.copy_(p.data)
        self.rounded.copy_(self.master)
        homes = zip(params, self.views(self.rounded), self.views(self.master), strict=True)
        for p, low, high in homes:
            p.data = low if p in rounded else high

    def views(self, flat: Tensor) -> list[Tensor]:
        """The part of each parameter, in its shape."""
        return [
            flat[start : start + p.numel()].view_as(p)
            for start, p in zip(self._starts, self.params, strict=True)
        ]


class MasterAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) whose parameters are float32 copies of the model's.

    From here on the model holds ``model.low_precision_parameters()`` in ``dtype``, the others in
    float32; ``master_state_dict`` has all in float32. Groups, order and state are those of
    ``model.configure_optimizers``: a ``state_dict`` of either loads into the other.

    The gradient of a backward pass is added to a float32 buffer at once and ``p.grad`` is left
    None. ``param_groups[i]["lr"]`` is a tensor on the device. While the attribute ``found_inf``, a
    tensor (), is not 0, ``step`` changes nothing.

    Args:
        model: on its device, in float32.
        dtype: torch.bfloat16 or torch.float16.
        weight_decay, learning_rate, betas: as in ``configure_optimizers``.

    Raises:
        TypeError: ``dtype`` is neither, or a parameter is not float32.
    """

    def __init__(
        self,
        model: LanguageModel,
        dtype: torch.dtype,
        weight_decay: float,
        learning_rate: float,
        betas: tuple[float, float],
    ) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(f"dtype must be torch.bfloat16 or torch.float16, got {dtype}")
        for name, p in model.named_parameters():
            if p.dtype != torch.float32:
                raise TypeError(f"{name} must be float32 before the master copy, got {p.dtype}")
        rounded = set(model.low_precision_parameters())
        plan = model.configure_optimizers(weight_decay, learning_rate, betas, "cpu").param_groups
        device = next(model.parameters()).device
        self._groups = [_Group(group["params"], rounded, dtype, device) for group in plan]
        self._model = model
        self._clip: Tensor | None = None
        self._has_grad: set[nn.Parameter] = set()
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
            moments = zip(
                options["params"],
                group.views(group.exp_avg),
                group.views(group.exp_avg_sq),
                strict=True,
            )
            for p, exp_avg, exp_avg_sq in moments:
                self.state[p] = {"step": group.step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
            for p, grad in zip(group.params, group.views(group.grad), strict=True):
                p.register_post_accumulate_grad_hook(self._adder(grad))

    def _adder(self, total: Tensor) -> Callable[[Tensor], None]:
        def add(p: Tensor) -> None:
            assert p.grad is not None and isinstance(p, nn.Parameter)
            if p in self._has_grad:
                total.add_(p.grad)
            else:
                total.copy_(p.grad)
                self._has_grad.add(p)
            p.grad = None

        return add

    @torch.no_grad()
    def _complete_gradients(self) -> None:
        """A parameter that no loss reached since ``zero_grad`` has the gradient 0."""
        for group in self._groups:
            for p, grad in zip(group.params, group.views(group.grad), strict=True):
                if p not in self._has_grad:
                    grad.zero_()
                    self._has_grad.add(p)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """The norm of all gradients together; the next ``step`` scales them down to ``max_norm`` if
        it is larger. As ``torch.nn.utils.clip_grad_norm_``, but the gradients are left alone.
        """
        self._complete_gradients()
        norms = torch.stack([torch.linalg.vector_norm(group.grad) for group in self._groups])
        norm = torch.linalg.vector_norm(norms)
        self._clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by the gradients since ``zero_grad``."""
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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; the buffers are written anew by the next backward pass."""
        self._has_grad.clear()
        self._clip = None

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
        """Take over moments and counts from a ``state_dict`` of this class, or of the AdamW that
        ``configure_optimizers`` gives. Options and learning rate stay as they are.

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
            moments = zip(
                saved["params"],
                group.views(group.exp_avg),
                group.views(group.exp_avg_sq),
                strict=True,
            )
            for index, exp_avg, exp_avg_sq in moments:
                found = state[index]
                for name, target in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
                    if found[name].shape != target.shape:
                        raise ValueError(
                            f"{name} of parameter {index} must have shape {tuple(target.shape)}, "
                            f"got {tuple(found[name].shape)}"
                        )
                    target.copy_(found[name])
                group.step.fill_(float(found["step"]))


def saved_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` as a run of any kind reads it, nanoGPT's too: without the options
    that a CUDA graph needed, the learning rate a number."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(lr=float(group["lr"]), capturable=False)
    return state
