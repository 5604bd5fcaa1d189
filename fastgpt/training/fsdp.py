"""Sharded models with PyTorch's FSDP2 (``fully_shard``).

Each tensor is sharded along its rows. A block's tensors are all-gathered for its forward and again
for its backward, after which their gradients are reduce-scattered. Each rank keeps only 1/N of
weights, gradients and moments between steps. The tied token embedding, used at both ends of a pass,
is in the outermost group. The LayerNorms form one group that stays gathered from forward to
backward, because a block applies the first LayerNorm of the next.
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
    """Shard ``model`` in place. It must be on ``device`` and the same in every rank.

    The shards are float32. With ``dtype`` bfloat16 the blocks and embeddings are gathered and used
    in bfloat16; gradients are reduced in float32.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    plain = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast casts activations
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
    """Clear FSDP2's list of modules still to run. After a pass without backward, PyTorch 2.11 keeps
    the LayerNorms in it that were never called as modules, because a block applies them itself, and
    does not gather their parameters in the next pass."""
    fully_shard.state(norm)._modules_to_run_forward.clear()  # type: ignore[attr-defined]


def full_state_dict(model: LanguageModel) -> dict[str, Tensor]:
    """The unsharded ``state_dict``. Collective: every rank must call it."""
    return {name: full_tensor(value) for name, value in model.state_dict().items()}


def full_tensor(tensor: Tensor) -> Tensor:
    """All-gather a sharded tensor; any other is unchanged. Collective: every rank must call it."""
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
    """AdamW's initial state, by parameter index."""
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
