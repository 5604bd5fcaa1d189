"""Linear + cross-entropy in chunks of rows: code shared by torch_ops and the Triton op.

    logits = x @ weight.T              x (M, C), weight (V, C), logits (M, V)
    lse_i = log(sum over j of exp(logits_ij))                       p_ij = exp(logits_ij - lse_i)
    loss_i = lse_i - (1 - e) * logits_it - e * mean over j of logits_ij + z * lse_i^2
    dlogits_ij = p_ij * (1 + 2 * z * lse_i) - (1 - e) * [j = t] - e / V

with target t, label smoothing e and z-loss z. One buffer holds the logits of a chunk of rows, and
then, in place, their gradient. The chunk's part of dx and dweight is computed at once, so all
logits are never in memory together. dlogits are gradients of the sum of the losses, which fit
float16's range; the backward scales dx and dweight by the incoming gradient over the divisor.

Saved for backward: dx in the dtype of the products, dweight in float32, and the divisor. FLOPs:
2 M V C for each of logits, dx and dweight, all in the forward. Bytes at s per element: 5 s M V for
the chunks (one product writes them, the rows are read and written, two products read them).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels._operators import differentiable, fake, operator, wants_gradient
from fastgpt.kernels._tensors import as_matrix, autocast_dtype, matmul_float32

# rows(logits, targets, losses, ignore_index, label_smoothing, z_loss, want_gradient) writes the
# losses (rows), 0 if ignored. With want_gradient it overwrites logits (rows, V), columns adjacent,
# with dlogits; otherwise it may overwrite them with anything.
RowsFunction = Callable[[Tensor, Tensor, Tensor, int, float, float, bool], None]

# Memory for the logits of one chunk. On CUDA, 4096 rows of GPT-2 in half precision: dweight (V, C)
# is read and written once per chunk, which costs little next to products of so many rows.
# Elsewhere, 512 rows of GPT-2 in float32: products of more rows are no faster on a CPU.
CHUNK_BYTES = {"cuda": 512 * 2**20, "other": 128 * 2**20}

_ALIGNMENT = 64  # elements: each row of the buffer is aligned, whatever V is


def chunk_rows(n_cols: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk: a power of two, since most batches are a multiple of one."""
    limit = CHUNK_BYTES["cuda" if device.type == "cuda" else "other"]
    return 2 ** max(0, (limit // (n_cols * dtype.itemsize)).bit_length() - 1)


def forward(
    rows: RowsFunction,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    ignore_index: int,
    mean: bool,
    label_smoothing: float,
    z_loss: float,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and divisor (scalars); dx and dweight, unscaled, empty where not wanted."""
    wide = torch.promote_types(dtype, torch.float32)
    dx = x.new_empty(x.shape if want_dx else 0, dtype=dtype)
    dweight = None if want_dweight else x.new_empty(0, dtype=wide)
    x = as_matrix(x).to(dtype)
    weight = weight.to(dtype)
    targets = targets.reshape(-1).contiguous()
    n_rows, n_cols = x.shape[0], weight.shape[0]
    losses = x.new_empty(n_rows, dtype=wide)

    step = chunk_rows(n_cols, dtype, x.device)
    stride = -(-n_cols // _ALIGNMENT) * _ALIGNMENT
    buffer = x.new_empty(min(step, n_rows), stride)
    if x.device.type == "cpu":
        # oneDNN's AMX kernels multiply the padding of an odd row by 0: it must not be NaN.
        buffer[:, n_cols:].zero_()
    buffer = buffer[:, :n_cols]
    for start in range(0, n_rows, step):
        chunk = slice(start, min(start + step, n_rows))
        logits = torch.mm(x[chunk], weight.t(), out=buffer[: chunk.stop - start])
        rows(
            logits,
            targets[chunk],
            losses[chunk],
            ignore_index,
            label_smoothing,
            z_loss,
            want_dx or want_dweight,
        )
        if want_dx:
            torch.mm(logits, weight, out=dx.view_as(x)[chunk])
        if want_dweight:
            dweight = matmul_float32(logits.t(), x[chunk], accumulate_into=dweight)

    if dweight is None:  # x has no rows
        dweight = x.new_zeros(weight.shape, dtype=wide)
    return *reduced(losses, targets, ignore_index, mean), dx, dweight


def reduced(
    losses: Tensor, targets: Tensor, ignore_index: int, mean: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and the divisor of its gradients."""
    if mean:
        divisor = torch.sum(targets != ignore_index, dtype=losses.dtype)
    else:
        divisor = losses.new_ones(())
    return losses.sum() / divisor, divisor


def _fake_forward(
    x, weight, targets, dtype, ignore_index, mean, label_smoothing, z_loss, want_dx, want_dweight
):
    wide = torch.promote_types(dtype, torch.float32)
    loss, divisor = x.new_empty((), dtype=wide), x.new_empty((), dtype=wide)
    dx = x.new_empty(x.shape if want_dx else 0, dtype=dtype)
    return loss, divisor, dx, x.new_empty(weight.shape if want_dweight else 0, dtype=wide)


def _scale(
    grad: Tensor,
    divisor: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dx_dtype: torch.dtype,
    dweight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The gradients in the dtypes of x and weight, rounded once. They are 0 if no row is valid."""
    # view(1): PyTorch casts a tensor without dimensions to the other operand's dtype.
    factor = (grad.to(divisor.dtype) / divisor.clamp(min=1.0)).view(1)
    return (
        torch.mul(dx, factor, out=torch.empty_like(dx, dtype=dx_dtype)),
        torch.mul(dweight, factor, out=torch.empty_like(dweight, dtype=dweight_dtype)),
    )


def _fake_scale(grad, divisor, dx, dweight, dx_dtype, dweight_dtype):
    return torch.empty_like(dx, dtype=dx_dtype), torch.empty_like(dweight, dtype=dweight_dtype)


def define_scale(name: str, scale: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """Register ``fastgpt::name``, the backward of a loss. ``scale``: a function like ``_scale``."""
    op = operator(name)(scale)
    fake(op)(_fake_scale)
    return op


_scale_op = define_scale("linear_cross_entropy_bwd_torch", _scale)


def _setup_context(ctx, inputs, output):
    x, weight, *_, ctx.want_dx, ctx.want_dweight = inputs
    _, divisor, dx, dweight = output
    ctx.dtypes = x.dtype, weight.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(divisor, dx, dweight)


def define(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    scale_op: Callable[..., tuple[Tensor, Tensor]] = _scale_op,
) -> Callable[..., tuple[Tensor, ...]]:
    """Register ``fastgpt::name``. ``forward``: ``forward`` with its ``rows`` argument bound, or a
    function like it; ``scale_op``: a result of ``define_scale``."""

    def backward(ctx, grad, *_):
        if grad is None:  # the differentiated result does not depend on the loss
            return ()
        dx, dweight = scale_op(grad, *ctx.saved_tensors, *ctx.dtypes)
        return dx if ctx.want_dx else None, dweight if ctx.want_dweight else None

    op = operator(
        name,
        "(Tensor x, Tensor weight, Tensor targets, ScalarType dtype, int ignore_index, "
        "bool mean, float label_smoothing, float z_loss, bool want_dx, bool want_dweight) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
    )(forward)
    fake(op)(_fake_forward)
    differentiable(op, backward, _setup_context)
    return op


def apply(
    op: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The loss by ``op``, a result of ``define``, which computes only the required gradients."""
    return op(
        x,
        weight,
        targets,
        autocast_dtype(x),
        ignore_index,
        reduction == "mean",
        label_smoothing,
        z_loss,
        wants_gradient(x),
        wants_gradient(weight),
    )[0]
