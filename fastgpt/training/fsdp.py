"""A sharded model: PyTorch's FSDP2 (``fully_shard``).

Each tensor is sharded along its rows. A block's tensors are all-gathered for its forward and again
for its backward, after which their gradients are reduce-scattered; what outlives a step (weights,
gradients, moments) is 1/N of the model. The tied token table, used at both ends of a pass, is in
the outermost group. The LayerNorms form one group, gathered from forward to backward, because a
block applies the LayerNorm of the next.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastgpt.blocks import keep_plain
from fastgpt.language_model import LanguageModel
from fastgpt.model import GPT
from fastgpt.training.distributed import World


def shard(model: LanguageModel, device: torch.device, world: World, dtype: torch.dtype) -> None:
    """Shard ``model``, which is on ``device`` and the same in every rank, in place.

    The shards are float32. With ``dtype`` bfloat16 the blocks and the tables are gathered and used
    in it; gradients are reduced in float32.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast decides on activations
    rounded = plain
    if dtype == torch.bfloat16:
        rounded = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if isinstance(model, GPT):
        trunk = model.transformer
        blocks: list[Any] = list(trunk.h)
        norms = [trunk.ln_f, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))]
        fully_shard(norms, mesh=mesh, mp_policy=plain, reshard_after_forward=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=rounded)
        for module in (*norms, *blocks):
            keep_plain(module)
    fully_shard(model, mesh=mesh, mp_policy=rounded)
    if isinstance(model, GPT):
        model.register_forward_pre_hook(partial(_begin_pass, norms[0]), prepend=True)


def _begin_pass(norm: nn.Module, *_: Any) -> None:
    """PyTorch 2.11 remembers, from a pass without a backward, which LayerNorms were not called (a
    block applies most of them itself), and would not gather their vectors in the next pass."""
    fully_shard.state(norm)._modules_to_run_forward.clear()  # type: ignore[attr-defined]


def full_state_dict(model: LanguageModel) -> dict[str, Tensor]:
    """The unsharded ``state_dict``. Collective: every rank must call it."""
    return {name: full_tensor(value) for name, value in model.state_dict().items()}


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor all-gathered; any other as it is. Collective: every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_optimizer_state(
    state: dict[int, dict[str, Tensor]], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """This process's shards of an optimizer's unsharded ``state``.

    Raises KeyError or ValueError if it belongs to other parameters.
    """
    return {
        index: {name: _shard(tensor, p) for name, tensor in state[index].items()}
        for index, p in _numbered(optimizer).items()
    }


def _shard(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    if tensor.shape != like.shape:
        raise ValueError(f"expected a tensor {tuple(like.shape)}, got {tuple(tensor.shape)}")
    assert isinstance(like, DTensor)
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def empty_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """AdamW's state before the first update, by the index of each parameter."""
    return {
        index: {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
        for index, p in _numbered(optimizer).items()
    }


def _numbered(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    return dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
