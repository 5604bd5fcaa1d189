"""Cost formulas of our operators, which PyTorch sees as opaque calls: the FLOPs and the bytes of
device memory of each kernel inside.

Each formula is used twice: ``torch.utils.flop_counter`` receives the sum of the FLOPs (after
``fused`` was imported), ``bench/roofline.py`` every kernel. An operator without a formula counts as
one kernel that reads its inputs, writes its outputs and multiplies no matrices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastgpt.kernels import chunked_loss, configs, gemm, linear_cross_entropy
from fastgpt.kernels._attention import block_d
from fastgpt.kernels._operators import fill_none
from fastgpt.kernels._tensors import row_count, split_heads


class KernelCost(NamedTuple):
    """One launch, or a loop of identical launches."""

    name: str
    flops: int  # of matrix products only, 2 M N K each, as PyTorch counts them
    bytes: int  # read plus written in device memory; repeated reads from a cache count once
    fp8: bool = False  # the product is of 8-bit matrices


CostFormula = Callable[..., list[KernelCost]]

COSTS: dict[str, CostFormula] = {}  # by operator name as in ``str(torch.ops.fastgpt.gelu)``


def _cost_of(*names: str) -> Callable[[CostFormula], CostFormula]:
    """Decorate the cost formula of ``fastgpt::name``.

    The formula is called as ``formula(out, *args)`` with the operator's result and arguments. Their
    tensors are often fake, so it may read only shapes and dtypes.
    """

    def register(formula: CostFormula) -> CostFormula:
        COSTS.update({f"fastgpt.{name}": formula for name in names})
        return formula

    return register


def _flops(formula: CostFormula, *args: Any, out_val: Any, **kwargs: Any) -> int:
    return sum(kernel.flops for kernel in formula(out_val, *args, **kwargs))


@functools.cache
def publish() -> None:
    """Register the formulas with PyTorch's FLOP counter, after the operators are defined."""
    for name, formula in COSTS.items():
        op = getattr(torch.ops.fastgpt, name.removeprefix("fastgpt."), None)
        if op is not None:  # its implementation was imported
            register_flop_formula(op, get_raw=True)(functools.partial(_flops, formula))


def nbytes(*tensors: Tensor | None) -> int:
    """The total bytes of the tensors' elements."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# ------------------------------------------------------------------------------------- embedding


# Each distinct id reads its row of the table once: at most as many rows as there are ids.
@_cost_of("embedding")
def _(out, idx, token_weight, position_weight, *_options):
    rows = min(idx.numel(), token_weight.shape[0]) + idx.shape[1]
    tables = rows * token_weight.shape[1] * token_weight.element_size()
    return [KernelCost("embedding", 0, nbytes(idx, out) + tables)]


@_cost_of("embedding_bwd_token")
def _(dtoken, dout, idx, *_options):
    sort = nbytes(idx) + idx.numel() * (idx.element_size() + 16)  # ids in; ids, order, ends out
    return [
        KernelCost("sort", 0, sort),
        KernelCost("embedding_bwd_token", 0, nbytes(dout, dtoken) + sort - nbytes(idx)),
    ]


# ------------------------------------------------------------------------------------- attention


def attention_pairs(n_queries: int, n_keys: int, causal: bool) -> int:
    """The number of scores computed per head. With a causal mask, those below the diagonal, counted
    as half of a square."""
    if not causal:
        return n_queries * n_keys
    square = min(n_queries, n_keys)
    return square * square // 2 + (n_queries - square) * n_keys


def _attention_product(q: Tensor, k: Tensor, causal: bool) -> int:
    batch, n_head, n_queries, head_size = q.shape
    return 2 * batch * n_head * attention_pairs(n_queries, k.shape[2], causal) * head_size


def _attention_fwd(q, k, v, out, lse, causal):
    """q, k, v as (B, H, T, D). Two products per tile. Documents cost as much as causal attention,
    because the savings depend on values, which a formula does not read."""
    product = _attention_product(q, k, causal)
    return [KernelCost("fwd", 2 * product, nbytes(q, k, v, out, lse))]


def _attention_bwd(q, k, v, out, lse, causal):
    """Three and four products per tile: both kernels compute the scores and dP."""
    product = _attention_product(q, k, causal)
    dq, dk, dv, dout, delta = q, k, v, out, lse[:, :, 0]  # stand-ins of equal size
    return [
        KernelCost("dq", 3 * product, nbytes(q, k, v, out, dout, lse, delta, dq)),
        KernelCost("dkdv", 4 * product, nbytes(q, k, v, dout, lse, delta, dk, dv)),
    ]


@_cost_of("attention")
def _(out, q, k, v, key_lengths, seed, doc_start, causal, *_):
    return _attention_fwd(q, k, v, *out, causal)


@_cost_of("attention_bwd")
def _(grads, dout, q, k, v, out, lse, key_lengths, seed, doc_start, causal, *_):
    return _attention_bwd(q, k, v, out, lse, causal)


@_cost_of("attention_qkvpacked")
def _(out, qkv, n_head, seed, doc_start, causal, *_):
    return _attention_fwd(*split_heads(qkv, n_head), *out, causal)


@_cost_of("attention_qkvpacked_bwd")
def _(dqkv, dout, qkv, out, lse, n_head, seed, doc_start, causal, *_):
    return _attention_bwd(*split_heads(qkv, n_head), out, lse, causal)


@_cost_of("attention_decode")
def _(out, qkv, cache, positions, scale):
    """The cost with a full cache, since positions are on the device and are not read."""
    _, batch, n_head, n_slots, head_size = cache.shape
    config = configs.find(cache, "attention_decode", "fwd", block_d(head_size))
    n_parts = -(-n_slots // config.BLOCK_N)
    wide = 8 if cache.dtype == torch.float64 else 4
    parts = batch * n_head * n_parts * (head_size + 2) * wide
    flops = 4 * batch * n_head * n_slots * head_size
    return [
        KernelCost("decode", flops, nbytes(qkv, cache, positions) + parts),
        KernelCost("decode sum", 0, nbytes(positions, out) + parts),
    ]


# ----------------------------------------------------------------------------------- linear and MLP


def _product(name: str, m: int, n: int, k: int, *tensors: Tensor | None) -> KernelCost:
    """An (m, k) by (k, n) product that moves each tensor once."""
    return KernelCost(name, 2 * m * n * k, nbytes(*tensors))


def _casting(dtype: torch.dtype, *weights: Tensor | None) -> list[KernelCost]:
    """Casts of the weights that do not have ``dtype`` yet."""
    moved = sum(
        w.numel() * (w.element_size() + dtype.itemsize)
        for w in weights
        if w is not None and w.dtype != dtype
    )
    return [KernelCost("weight cast", 0, moved)] if moved else []


def _recomputing(ln_weight: Tensor | None, saved: Tensor, dtype: torch.dtype) -> list[KernelCost]:
    if ln_weight is None:
        return []
    return [KernelCost("LayerNorm recomputed", 0, nbytes(saved) + saved.numel() * dtype.itemsize)]


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A meta tensor of x's shape in the product's dtype."""
    return x.new_empty(x.shape, dtype=dtype, device="meta")


# The following count launches as on an H100 or H200 in half precision, on any device and dtype.


def _on_hopper(kernel: str, *options: str) -> Any:
    """The launch configuration of a kernel of ``gemm``, None for cuBLAS."""
    config = configs.lookup("gemm", kernel, 90, torch.bfloat16, configs.ANY, options)
    return None if config == configs.CUBLAS else config


def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor
) -> list[KernelCost]:
    """The cost of ``linear_gelu``, whose two results are shaped like ``hidden``."""
    flops = 2 * hidden.numel() * x.shape[-1]
    operands = nbytes(x, weight, bias)
    if _on_hopper("fwd") is not None:
        return [KernelCost("linear + GELU", flops, operands + 2 * nbytes(hidden))]
    return [
        KernelCost("linear", flops, operands + nbytes(hidden)),
        KernelCost("GELU", 0, 2 * nbytes(hidden)),
    ]


def _linear_gelu_gradient(
    dy: Tensor, weight: Tensor, pre: Tensor, recompute: bool, dbias: Tensor | None
) -> list[KernelCost]:
    """The cost of ``linear_gelu_gradient``; ``dbias``: its third result."""
    flops = 2 * pre.numel() * dy.shape[-1]
    operands = nbytes(dy, weight)
    config = _on_hopper("bwd", *["recompute"] * recompute)
    epilogue = (2 + recompute) * nbytes(pre)
    rows = gemm.ROWS if config is None else config.BLOCK_M
    parts = 0 if dbias is None else -(-pre.shape[0] // rows) * 4 * pre.shape[1]
    if config is not None:
        kernels = [KernelCost("linear dx * GELU'", flops, operands + epilogue + parts)]
    else:
        kernels = [
            KernelCost("linear dx", flops, operands + nbytes(pre)),
            KernelCost("GELU'", 0, nbytes(pre) + epilogue + parts),
        ]
    if dbias is not None:
        kernels.append(KernelCost("linear dbias, sum of parts", 0, parts + nbytes(dbias)))
    return kernels


def _weight_gradient(dy: Tensor, x: Tensor, *gradients: Tensor) -> list[KernelCost]:
    """The cost of ``weight_gradient``, whose results are shaped like ``gradients``."""
    n_cols = x.shape[-1]
    n_tokens, n_rows = row_count(x), gradients[0].shape[0]
    flops = 2 * n_tokens * n_rows * n_cols
    config = _on_hopper("weight", *["bias"] * (len(gradients) - 1)) if flops else None
    if config is None:
        rounded = gradients[0].dtype != torch.float32
        moved = 4 * n_rows * n_cols + nbytes(gradients[0]) if rounded else 0
        return [
            KernelCost("linear dweight", flops, nbytes(dy, x) + 4 * n_rows * n_cols),
            KernelCost("linear dweight, rounded", 0, moved),
            *(KernelCost("linear dbias", 0, nbytes(dy, dbias)) for dbias in gradients[1:]),
        ]
    n_tiles = -(-n_rows // config.BLOCK_M) * -(-n_cols // config.BLOCK_N)
    n_splits = gemm.splits(n_rows, n_cols, n_tokens, n_tiles, 132 * config.programs)
    split = n_splits > 1
    partial = 4 * n_splits * n_rows * n_cols if split else nbytes(*gradients)
    moved = partial + nbytes(*gradients) if split else 0
    return [
        KernelCost("linear dweight", flops, nbytes(dy, x) + partial),
        KernelCost("linear dweight, sum of parts", 0, moved),
    ]


@_cost_of("linear")
def _(out, x, weight, bias, *_):
    n, k = weight.shape
    w = _operand(weight, x.dtype)
    return [
        *_casting(x.dtype, weight, bias),
        _product("linear", row_count(x), n, k, x, w, bias, out),
    ]


@_cost_of("linear_bwd")
def _(out, dy, weight, saved, ln_weight, ln_bias, eps, has_bias, wants_dx, wants_dweight):
    n, k = weight.shape
    tokens = row_count(dy)
    w = _operand(weight, dy.dtype)
    kernels = []
    if wants_dx:
        kernels += [
            *_casting(dy.dtype, weight),
            _product("linear dx", tokens, k, n, dy, w, out[0]),
        ]
    if wants_dweight:
        kernels += _recomputing(ln_weight, saved, dy.dtype)
        kernels += _weight_gradient(dy, _operand(saved, dy.dtype), *out[wants_dx:])
    return kernels


@_cost_of("mlp")
def _(out, x, fc_weight, fc_bias, proj_weight, *_):
    f, c = fc_weight.shape
    n = proj_weight.shape[0]
    tokens = row_count(x)
    fc, proj = _operand(fc_weight, x.dtype), _operand(proj_weight, x.dtype)
    hidden = x.new_empty(tokens, f, device="meta")
    return [
        *_casting(x.dtype, fc_weight, proj_weight),
        *_linear_gelu(x, fc, fc_bias, hidden),
        _product("linear", tokens, n, f, hidden, proj, out[0]),
    ]


@_cost_of("mlp_bwd")
def _(
    out, dy, fc_weight, proj_weight, saved, ln_weight, ln_bias, pre, act, eps, approximate,
    has_bias, wants_dx, wants_dfc, wants_dproj,
):  # fmt: skip
    f, c = fc_weight.shape
    tokens = pre.shape[0]
    fc, proj = _operand(fc_weight, dy.dtype), _operand(proj_weight, dy.dtype)
    dx, dfc, dbias, dproj = fill_none(out, wants_dx, wants_dfc, wants_dfc and has_bias, wants_dproj)
    kernels: list[KernelCost] = [
        *_casting(dy.dtype, proj_weight, fc_weight if wants_dx else None),
        *_linear_gelu_gradient(dy, proj, pre, act is None and wants_dproj, dbias),
    ]
    if wants_dx:
        kernels.append(_product("linear dx", tokens, c, f, pre, fc, dx))
    if wants_dfc:
        kernels += _recomputing(ln_weight, saved, dy.dtype)
        kernels += _weight_gradient(pre, _operand(saved, dy.dtype), dfc)
    if wants_dproj:
        kernels += _weight_gradient(dy, pre, dproj)
    return kernels


# ----------------------------------------------------------------------------------------- the loss


def _quantising(name: str, x: Tensor, columns: bool) -> list[KernelCost]:
    """The cost of ``quantise``, which reads x for the maximum and for the cast."""
    size = nbytes(x)
    costs = [
        KernelCost(f"{name} maximum", 0, size),
        KernelCost(f"{name} to fp8", 0, size + x.numel()),
    ]
    return costs + [KernelCost(f"{name} transposed", 0, 2 * x.numel())] * columns


@_cost_of("linear_cross_entropy", "linear_cross_entropy_torch_ops")
def _(out, x, weight, targets, dtype, ignore_index, mean, smoothing, z_loss, want_dx, want_dweight):
    n_cols, width = weight.shape
    n_rows, size = targets.numel(), dtype.itemsize
    # The chunks of a GPU, whatever device the tensors are on.
    chunks = -(-n_rows // chunked_loss.chunk_rows(n_cols, dtype, torch.device("cuda")))
    flops = 2 * n_rows * n_cols * width
    logits, x_bytes = size * n_rows * n_cols, size * n_rows * width
    weights = chunks * size * n_cols * width  # read once a chunk
    passes = 2 if want_dx or want_dweight else 1
    costs = [
        KernelCost("logits", flops, x_bytes + weights + logits),
        KernelCost("rows", 0, passes * logits + nbytes(targets)),
    ]
    if want_dx:
        costs.append(KernelCost("dx", flops, logits + weights + x_bytes))
    if want_dweight:  # the first chunk writes it, the others read and write it
        accumulated = max(1, 2 * chunks - 1) * nbytes(out[3])
        costs.append(KernelCost("dweight", flops, logits + x_bytes + accumulated))
    for name, tensor in (("cast x", x), ("cast weight", weight)):
        if tensor.dtype != dtype:
            costs.append(KernelCost(name, 0, nbytes(tensor) + size * tensor.numel()))
    return costs


@_cost_of("linear_cross_entropy_bwd", "linear_cross_entropy_bwd_torch")
def _(out, grad, divisor, dx, dweight, dx_dtype, dweight_dtype):
    return [
        KernelCost("scale dx", 0, nbytes(dx, out[0])),
        KernelCost("scale dweight", 0, nbytes(dweight, out[1])),
    ]


@_cost_of("linear_cross_entropy_fp8")
def _(out, x, weight, targets, dtype, ignore_index, mean, smoothing, z_loss, want_dx, want_dweight):
    n_cols, width = weight.shape
    n_rows, size = targets.numel(), dtype.itemsize
    # The chunks of a GPU, whatever device the tensors are on.
    chunks = -(-n_rows // linear_cross_entropy._fp8_chunk_rows(n_cols, dtype, torch.device("cuda")))
    flops, cells = 2 * n_rows * n_cols * width, n_rows * n_cols
    x8, weights8 = n_rows * width, chunks * n_cols * width
    gradient = want_dx or want_dweight
    x_cast = _operand(x, dtype)
    costs = [KernelCost("cast x", 0, nbytes(x, x_cast))] if x.dtype != dtype else []
    costs += _quantising("x", x_cast, columns=want_dweight)
    costs += _quantising("weight", weight, columns=want_dx)
    costs.append(KernelCost("logits", flops, x8 + weights8 + size * cells, fp8=True))
    costs.append(KernelCost("rows", 0, (size + gradient) * cells + nbytes(targets)))
    if want_dx:
        moved = cells + weights8 + 3 * size * n_rows * width  # written to a new tensor, then copied
        costs.append(KernelCost("dx", flops, moved, fp8=True))
    if want_dweight:
        costs.append(KernelCost("dlogits transposed", 0, 2 * cells))
        costs.append(KernelCost("dweight", flops, cells + x8 + chunks * nbytes(out[3]), fp8=True))
        costs.append(KernelCost("sum of dweight", 0, 3 * max(0, chunks - 1) * nbytes(out[3])))
    return costs


# -------------------------------------------------------------------------------------------- AdamW


@_cost_of("adamw")
def _(out, param, rounded, grad, exp_avg, exp_avg_sq, *_):
    written = nbytes(param, rounded, exp_avg, exp_avg_sq)
    return [KernelCost("AdamW", 0, nbytes(param, grad, exp_avg, exp_avg_sq) + written)]
