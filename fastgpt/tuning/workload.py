"""A model in training, and the op calls of its training step, with their tensors."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastgpt import ops as default_ops
from fastgpt.devices import autocast
from fastgpt.kernels import _host, reference
from fastgpt.language_model import GPTConfig
from fastgpt.model import GPT

_DOCUMENT = 256  # tokens per document, with document_mask
_MOST_PARAMETERS = 1 << 26  # in AdamW's update, whose time is proportional to their number


@dataclass(frozen=True)
class Workload:
    """A model in training on one GPU: its shape and the options that determine its kernels.

    Raises ValueError for an empty batch.
    """

    config: GPTConfig
    batch_size: int = 32
    dtype: torch.dtype = torch.bfloat16
    recompute: bool = False
    document_mask: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")

    def __str__(self) -> str:
        """One line, by which the table's file identifies the workload."""
        shape = asdict(self.config)
        keys = {"batch_size": self.batch_size, "dtype": str(self.dtype).removeprefix("torch.")}
        keys |= {name: True for name in ("recompute", "document_mask") if getattr(self, name)}
        return " ".join(f"{name}={value}" for name, value in (shape | keys).items())


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an op. Its tensors are detached leaves with the same ``requires_grad``."""

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype  # of autocast

    def __str__(self) -> str:
        tensors = tensors_in((self.args, self.kwargs))
        shapes = (f"{tuple(x.shape)}" for x in tensors if x.dim() > 1)
        return " ".join((self.op, *shapes))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in arguments or results, including those in tuples and dictionaries."""
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``change`` applied to every tensor in it."""
    return tree_map_only(Tensor, change, value)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _recording(ops: ModuleType, dtype: torch.dtype, calls: list[Call]) -> ModuleType:
    """``ops``, recording every call in ``calls``."""
    recorder = ModuleType("recorder")

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            drawn = kwargs.get("dropout_p", 0.0) > 0.0 and kwargs["seed"] is None
            if drawn and name not in reference.OPS_OF_TENSOR_CORES:  # a kernel of ``fused_rows``
                kwargs["seed"] = _host.dropout_seed(args[0].device)  # the same mask in all calls
            calls.append(Call(name, mapped(_leaf, args), mapped(_leaf, kwargs), dtype))
            return getattr(ops, name)(*args, **kwargs)

        return call

    for name in reference.OPS:
        setattr(recorder, name, recorded(name))
    recorder.dropout_seed = ops.dropout_seed  # type: ignore[attr-defined]
    return recorder


def _calls_with(n_layer: int, work: Workload, device: torch.device, ops: ModuleType) -> list[Call]:
    """The op calls of a forward pass of the model with ``n_layer`` layers."""
    calls: list[Call] = []
    config = replace(work.config, n_layer=n_layer)
    with device:
        model = GPT(config, _recording(ops, work.dtype, calls), recompute=work.recompute)
        idx = torch.randint(1, max(2, config.vocab_size), (work.batch_size, config.block_size))
        idx.clamp_(max=config.vocab_size - 1)
    if work.document_mask:
        model.eot_token = 0
        idx[:, ::_DOCUMENT] = 0
    if work.dtype == torch.bfloat16:  # as MasterAdamW holds it
        for p in model.low_precision_parameters():
            p.data = p.data.to(work.dtype)
    with autocast(device, work.dtype):
        model(idx, idx)
    return calls


def calls_of(
    work: Workload, device: torch.device, ops: ModuleType = default_ops
) -> list[tuple[Call, int]]:
    """The distinct op calls of a training step, and the number of times each is made."""
    with torch.device("meta"):
        n_parameters = sum(p.numel() for p in GPT(work.config).parameters())
    once = _calls_with(1, work, device, ops)
    in_one = Counter(map(str, once))
    in_two = Counter(map(str, _calls_with(2, work, device, ops)))
    counts = {
        name: n + (work.config.n_layer - 1) * (in_two[name] - n) for name, n in in_one.items()
    }
    found = [(call, counts[name]) for name, call in {str(call): call for call in once}.items()]
    if work.dtype == torch.bfloat16:  # float16 has PyTorch's AdamW
        found.append((_adamw(min(n_parameters, _MOST_PARAMETERS), work.dtype, device), 1))
    return found


def _adamw(n: int, dtype: torch.dtype, device: torch.device) -> Call:
    """The update of ``MasterAdamW``."""
    param, grad, exp_avg, exp_avg_sq = (torch.randn(n, device=device) for _ in range(4))
    rounded = param.to(dtype)
    step, lr, clip, skip = (torch.full((), x, device=device) for x in (1.0, 1e-3, 1.0, 0.0))
    state = param, rounded, grad, exp_avg, exp_avg_sq.square_(), step, lr
    options = dict(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, clip=clip, skip=skip)
    return Call("adamw", state, options, torch.float32)
