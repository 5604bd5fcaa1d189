"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over flat buffers, in one pass.

    g' = c g        m' = b1 m + (1 - b1) g'        v' = b2 v + (1 - b2) g'^2
    p' = (1 - lr w) p - lr / (1 - b1^t) * m' / (sqrt(v' / (1 - b2^t)) + eps)

p, g, m and v are (N,), float32. c is the gradient-clipping factor, t the number of updates. If the
model computes in half precision, a rounded copy of p' is written too. The learning rate, c, t and
the flag to skip the update are tensors on the device: nothing here waits for the host, and a CUDA
graph can be replayed with new values.

Bytes moved per element: 28 (p, g, m, v in; p, m, v out), 30 with a bfloat16 copy; it is
memory-bound. g accumulates the half-precision gradients of the micro-batches, each of which adds
10 (g and its own gradient in; g out).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _checks, _host, configs


@triton.jit
def _adamw_scalars_kernel(
    scalars_ptr,  # (5), written
    step_ptr,  # (), incremented if the update is made
    lr_ptr,  # ()
    clip_ptr,  # (), read if HAS_CLIP
    skip_ptr,  # (), read if HAS_SKIP
    weight_decay,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_SKIP: tl.constexpr,
):
    counts = 1.0
    if HAS_SKIP:
        counts = tl.where(tl.load(skip_ptr) == 0.0, 1.0, 0.0)
    step = tl.load(step_ptr) + counts
    tl.store(step_ptr, step)
    # 1 - beta^t suffers from cancellation: use float64, which a single thread can afford.
    correction1 = 1.0 - tl.exp2(step.to(tl.float64) * LOG2_BETA1)
    correction2 = 1.0 - tl.exp2(step.to(tl.float64) * LOG2_BETA2)
    lr = tl.load(lr_ptr).to(tl.float64)
    tl.store(scalars_ptr, (lr / correction1).to(tl.float32))
    tl.store(scalars_ptr + 1, tl.sqrt(1.0 / correction2).to(tl.float32))
    tl.store(scalars_ptr + 2, (1.0 - lr * weight_decay).to(tl.float32))
    tl.store(scalars_ptr + 3, tl.load(clip_ptr) if HAS_CLIP else 1.0)
    tl.store(scalars_ptr + 4, counts)


@triton.jit
def _adamw_kernel(
    param_ptr,  # (n_elements)
    rounded_ptr,  # (n_elements), written if ROUNDED
    grad_ptr,  # (n_elements)
    exp_avg_ptr,  # (n_elements)
    exp_avg_sq_ptr,  # (n_elements)
    scalars_ptr,  # (5): step size, 1 / sqrt of the second correction, decay, clip, 0 to skip
    n_elements,
    eps,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(scalars_ptr + 4) != 0.0:
        step_size = tl.load(scalars_ptr)
        scale = tl.load(scalars_ptr + 1)
        decay = tl.load(scalars_ptr + 2)
        clip = tl.load(scalars_ptr + 3)
        offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n_elements
        grad = tl.load(grad_ptr + offs, mask=mask, other=0.0) * clip
        exp_avg = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0)
        param = tl.load(param_ptr + offs, mask=mask, other=0.0)
        exp_avg = BETA1 * exp_avg + (1.0 - BETA1) * grad
        exp_avg_sq = BETA2 * exp_avg_sq + (1.0 - BETA2) * grad * grad
        param = param * decay - step_size * exp_avg / (tl.sqrt_rn(exp_avg_sq) * scale + eps)
        tl.store(exp_avg_ptr + offs, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + offs, exp_avg_sq, mask=mask)
        tl.store(param_ptr + offs, param, mask=mask)
        if ROUNDED:
            tl.store(rounded_ptr + offs, param.to(rounded_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate_kernel(
    total_ptr,  # (n_elements)
    grad_ptr,  # (n_elements)
    n_elements,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_elements
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(total_ptr + offs, mask=mask, other=0.0)
    tl.store(total_ptr + offs, total + grad, mask=mask)


def accumulate(totals: list[Tensor], grads: list[Tensor]) -> None:
    """``totals[i] += grads[i]``. ``torch._foreach_add_`` does the same, but adds tensors of two
    dtypes at half the speed of a copy.

    Args:
        totals: float32, any shapes, contiguous, on one CUDA device.
        grads: same shapes and device, all of one dtype.
    """
    if grads[0].dtype == totals[0].dtype:
        torch._foreach_add_(totals, grads)
        return
    config = configs.find(totals[0], "adamw", "accumulate")
    with _host.on_device(totals[0]):
        for total, grad in zip(totals, grads, strict=True):
            _accumulate_kernel[(_host.cdiv(total.numel(), config.BLOCK),)](
                total, grad.contiguous(), total.numel(), **configs.launch(config)
            )


@torch.library.custom_op(
    "fastgpt::adamw", mutates_args=("param", "rounded", "exp_avg", "exp_avg_sq", "step")
)
def _adamw_op(
    param: Tensor,
    rounded: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    clip: Tensor | None,
    skip: Tensor | None,
) -> None:
    if not param.numel():
        return
    scalars = param.new_empty(5)
    config = configs.find(param, "adamw", "update")
    with _host.on_device(param):
        _adamw_scalars_kernel[(1,)](
            scalars,
            step,
            lr,
            clip,
            skip,
            weight_decay,
            LOG2_BETA1=math.log2(betas[0]) if betas[0] else -math.inf,
            LOG2_BETA2=math.log2(betas[1]) if betas[1] else -math.inf,
            HAS_CLIP=clip is not None,
            HAS_SKIP=skip is not None,
            num_warps=1,
            **_host.FMA,
        )
        _adamw_kernel[(_host.cdiv(param.numel(), config.BLOCK),)](
            param,
            rounded,
            grad,
            exp_avg,
            exp_avg_sq,
            scalars,
            param.numel(),
            eps,
            BETA1=betas[0],
            BETA2=betas[1],
            ROUNDED=rounded is not None,
            **configs.launch(config),
        )


@_adamw_op.register_fake
def _(*_):
    return None


def adamw(
    param: Tensor,
    rounded: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One AdamW update (Loshchilov & Hutter 2019, arXiv:1711.05101), in place, like
    ``torch.optim.AdamW``'s.

    Args:
        param: (N,) float32, contiguous, on a CUDA device.
        rounded: (N,) float16 or bfloat16, receives a rounded copy of the updated param; or None.
        grad: (N,) float32, like the moments ``exp_avg`` and ``exp_avg_sq``.
        step: () float32, the number of updates so far; incremented.
        lr: () float32, the learning rate.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: decoupled weight decay, multiplied by lr; at least 0.
        clip: () float32, a factor for the gradient, or None for 1.
        skip: () float32, or None. If it is not 0, nothing is changed.

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes, strides or devices do not match, or a number is out of range.
    """
    state = param, rounded, grad, exp_avg, exp_avg_sq, step, lr
    options = betas, eps, weight_decay, clip, skip
    _checks.adamw(*state, *options)
    _host.launchable(param=param)
    _adamw_op(*state, *options)
