"""Softmax attention, causal or full, forward and backward, without storing a (Tq, Tk) matrix.

    S = scale * Q Kᵀ     P = softmax(S) over the visible keys     O = dropout(P) V

q is (B, H, Tq, D), k and v are (B, H_kv, Tk, D). All are read through strides, so packed (B, T, 3C)
inputs need no copy. The forward is the online softmax of FlashAttention-2 (Dao 2023,
arXiv:2307.08691): each program owns a block of queries, iterates over the keys and rescales its
accumulator when the running maximum grows. If the launch table selects cuDNN and cuDNN supports the
inputs, it computes O and lse. The kernel works in base 2: P = 2^(c Q Kᵀ - lse) with
c = scale log2(e). Saved for backward: q, k, v, O, and lse (B, H, 1, Tq) in float32.

Large scores need more precision: at several thousand, a float32 lse has three decimals, and its
error enters every probability of the row. With 16-bit inputs this does not matter, because P is
rounded more coarsely anyway, and c Q Kᵀ - lse is one instruction. With 32-bit inputs (APART), lse
is (B, H, 2, Tq): the row maximum m of Q Kᵀ, and log2 of the sum. Then
P = 2^(c (Q Kᵀ - m) - log2(sum)), where Q Kᵀ - m is exact near the maximum.

    delta = sum over d of dO * O     dP = dropout(dO Vᵀ)     dS = P * (dP - delta)
    dQ = scale * dS K                dK = scale * dSᵀ Q      dV = dropout(P)ᵀ dO

The backward (``attention_bwd.py``) recomputes P in two kernels: one owns blocks of queries and
computes dQ and delta, the other owns blocks of keys and computes dK and dV. Each sum is formed by
one program in a fixed order without atomics, so results are bitwise reproducible.

Several documents in one sequence (PACKED): query i sees the keys doc_start[i] <= j <= i, and
doc_start is non-decreasing. A block of queries sees keys from the start of its first row's
document. From the start of its last row's document on, all its rows see them, so only the tiles
between the two starts are masked. For a tile of keys, doc_end[j], the number of doc_start values up
to j, is the end of the queries that see key j. (Counting in the kernel is a reduction, for which
the compiler keeps a whole tile in registers in float32.)

Key lengths (LENGTHS): each program reads the length of its sequence and uses it as Tk. Padding is
never loaded, so it cannot change a bit of the result. The kernel that owns keys writes zeros there.

Grouped queries (GROUP = H / H_kv query heads share a key head): query head h reads key head
h // GROUP. A program that owns keys iterates over the queries of all heads of its group, so dK and
dV are still single sums in a fixed order.

Bytes moved at s bytes per element, with C = H * D and H_kv = H: 4 s B T C forward (q, k, v in;
O out), 8 s B T C backward (q, k, v, O, dO in; dQ, dK, dV out), plus repeated reads, mostly from L2.
FLOPs: 4 B H Tq Tk D forward, 14 B H Tq Tk D backward (10 if S and dP were computed once); half if
causal. Documents and lengths reduce this, depending on their values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import _checks, _host
from fastgpt.kernels._attention import Options, check_head_size
from fastgpt.kernels._operators import differentiable, fake, operator
from fastgpt.kernels._tensors import attention_scale, split_heads, unpacked
from fastgpt.kernels.attention_bwd import attention_bwd
from fastgpt.kernels.attention_fwd import attention_fwd, empty_lse

# -------------------------------------------------------------------------- separate q, k and v

_BOTH = "attention or attention_qkvpacked"
_OPTIONS = (
    "Tensor? seed, Tensor? doc_start, bool causal, float scale, float dropout_p, int dropout_offset"
)


def _token_major(x: Tensor) -> Tensor:
    """A new (B, T, H, D) tensor, which views as (B, T, C), for x of shape (B, H, T, D)."""
    batch, n_head, length, head_size = x.shape
    return x.new_empty(batch, length, n_head, head_size)


@operator(
    "attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? key_lengths, {_OPTIONS}) -> (Tensor, Tensor)",
    _BOTH,
)
def _attention_op(q, k, v, key_lengths, *options):
    out, lse = attention_fwd(q, k, v, Options(*options, key_lengths))
    return out.transpose(1, 2), lse


@fake(_attention_op)
def _(q, *_):
    return _token_major(q).transpose(1, 2), empty_lse(q, *q.shape[:3])


@operator(
    "attention_bwd",
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? key_lengths, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _BOTH,
)
def _attention_bwd_op(dout, q, k, v, out, lse, key_lengths, *options):
    gradients = [_token_major(x) for x in (q, k, v)]
    dout, out = dout.transpose(1, 2), out.transpose(1, 2)
    attention_bwd(dout, q, k, v, out, lse, *gradients, Options(*options, key_lengths))
    return tuple(x.transpose(1, 2) for x in gradients)


@fake(_attention_bwd_op)
def _(dout, q, k, v, *_):
    return tuple(_token_major(x).transpose(1, 2) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, key_lengths, seed, doc_start, *ctx.options = inputs
    ctx.set_materialize_grads(False)  # do not allocate zeros for lse's gradient
    ctx.save_for_backward(q, k, v, *output, key_lengths, seed, doc_start)


def _backward(ctx, dout, _dlse):
    return () if dout is None else _attention_bwd_op(dout, *ctx.saved_tensors, *ctx.options)


differentiable(_attention_op, _backward, _setup_context)


# ------------------------------------------------------------------------------------ packed qkv


def qkvpacked_fwd(qkv, n_head, *options):
    out, lse = attention_fwd(*split_heads(qkv, n_head), Options(*options))
    return out.flatten(2), lse


_attention_qkvpacked_op = operator(
    "attention_qkvpacked", f"(Tensor qkv, int n_head, {_OPTIONS}) -> (Tensor, Tensor)"
)(qkvpacked_fwd)


@fake(_attention_qkvpacked_op)
def _(qkv, n_head, *_):
    batch, length, width = qkv.shape
    out = qkv.new_empty(batch, length, width // 3)
    return out, empty_lse(qkv, batch, n_head, length)


def qkvpacked_bwd(dout, qkv, out, lse, n_head, *options):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    gradients = (x.transpose(1, 2) for x in split_heads(dqkv, n_head))
    dout, out = (x.unflatten(2, (n_head, -1)) for x in (dout, out))
    attention_bwd(dout, *split_heads(qkv, n_head), out, lse, *gradients, Options(*options))
    return dqkv


_attention_qkvpacked_bwd_op = operator(
    "attention_qkvpacked_bwd",
    f"(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int n_head, {_OPTIONS}) -> Tensor",
)(qkvpacked_bwd)


@fake(_attention_qkvpacked_bwd_op)
def _(dout, qkv, *_):
    return qkv.new_empty(qkv.shape)


def _setup_context_qkvpacked(ctx, inputs, output):
    qkv, ctx.n_head, seed, doc_start, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, *output, seed, doc_start)


def _backward_qkvpacked(ctx, dout, _dlse):
    if dout is None:
        return ()
    qkv, out, lse, *tensors = ctx.saved_tensors
    options = ctx.n_head, *tensors, *ctx.options
    return (_attention_qkvpacked_bwd_op(dout, qkv, out, lse, *options),)


differentiable(_attention_qkvpacked_op, _backward_qkvpacked, _setup_context_qkvpacked)


# ------------------------------------------------------------------------------ public functions


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_offset: int = 0,
    doc_start: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Softmax attention (Vaswani et al. 2017), tiled as in FlashAttention-2 (Dao 2023,
    arXiv:2307.08691). Memory is linear in Tq and Tk; the backward is deterministic.

    Args:
        q: (B, H, Tq, D), D from 1 to 256; float32, float16 or bfloat16, on a CUDA device. Any
            strides; copied if D or a stride is not a multiple of 16 elements. Under autocast
            q, k and v are cast to its dtype.
        k, v: (B, H_kv, Tk, D), Tk at least 1; q's dtype and device, any strides. H is a multiple of
            H_kv: query head h uses key head h // (H / H_kv), like ``enable_gqa`` in
            ``F.scaled_dot_product_attention``.
        causal: query i sees the keys j <= i, aligned at the first query and key as in
            ``F.scaled_dot_product_attention(is_causal=True)``.
        scale: factor applied to q kᵀ, positive; 1 / sqrt(D) if None.
        dropout_p: dropout probability of the attention weights, from 0 to 0.999, rounded to a
            multiple of 2^-16.
        seed: int64 tensor with one element on q's device: the Philox key of the dropout mask. The
            mask depends only on seed, dropout_offset and position (``reference.dropout_mask``). If
            None, each call draws a seed from PyTorch's generator for the device.
        dropout_offset: selects one of the seed's independent masks, from 0 to 2^31 - 1.
        doc_start: int32 (B, T), for causal attention with Tq = Tk = T over several documents in one
            sequence: query i sees the keys doc_start[b, i] <= j <= i. Must be non-decreasing along
            T with 0 <= doc_start[b, i] <= i. The host does not read the values: invalid ones give
            wrong results, but no access outside the tensors.
        key_lengths: int32 (B,), from 0 to Tk: only the first key_lengths[b] keys of sequence b are
            valid. The rest is padding: no query sees it, whatever values it holds, and its
            gradients are 0. If no key is valid, the result and dq are 0. Must be None with
            doc_start. The host does not read the values: the kernels clamp them to [0, Tk].

    Returns:
        (B, H, Tq, D) of q's dtype, in the memory order of (B, Tq, H, D), with a gap after each row
        if D is not a multiple of 16. Softmax and sums are float32; float32 products use TF32 if
        ``torch.backends.cuda.matmul.allow_tf32`` is set. The result is saved for backward:
        modifying it in place before the backward is an error, as with
        ``F.scaled_dot_product_attention``.

        An infinity or NaN in v affects only the rows that see its key. It may turn such a whole row
        into NaN, where a plain product would change one column. If the launch table selects cuDNN,
        other rows of its tile may become NaN too.

    Raises:
        TypeError: q, k or v is not a floating-point tensor, or has an unsupported dtype.
        ValueError: shapes, dtypes or devices do not match, or an argument is out of range.
    """
    _checks.floating(q=q, k=k, v=v)
    q, k, v = (x.to(_host.autocast_dtype(x)) for x in (q, k, v))
    _checks.attention(
        q, k, v, causal, scale, dropout_p, seed, dropout_offset, doc_start, key_lengths
    )
    _host.launchable(q=q, k=k, v=v)
    check_head_size("q", q.shape[3])
    head_size = q.shape[3]
    if head_size % 16:  # columns of zeros change no product
        q, k, v = (F.pad(x, (0, -head_size % 16)) for x in (q, k, v))
    seed = _host.drawn_seed(seed, dropout_p, q.device)
    scale = attention_scale(scale, head_size)
    options = seed, doc_start, causal, scale, dropout_p, dropout_offset
    out, _ = _attention_op(q, k, v, key_lengths, *options)
    return out[..., :head_size]


def attention_qkvpacked(
    qkv: Tensor,
    n_head: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dropout_offset: int = 0,
    doc_start: Tensor | None = None,
) -> Tensor:
    """``attention`` on the packed output of a block's QKV projection: q, k and v side by side, each
    with its heads side by side. If D is a multiple of 16, nothing is split, transposed or
    concatenated in the forward or the backward.

    Args:
        qkv: (B, T, 3C), T at least 1, C = n_head * D; otherwise like q in ``attention``.
        n_head: number of heads.
        causal, scale, dropout_p, seed, dropout_offset, doc_start: see ``attention``.

    Returns:
        (B, T, C), contiguous; otherwise as in ``attention``.

    Raises:
        TypeError, ValueError: as ``attention``.
    """
    _checks.qkvpacked(qkv, n_head, causal, scale, dropout_p, seed, dropout_offset, doc_start)
    _host.launchable(qkv=qkv)
    head_size = qkv.shape[2] // (3 * n_head)
    check_head_size("qkv", head_size)
    if head_size % 16:
        return unpacked(
            attention, qkv, n_head, causal, scale, dropout_p, seed, dropout_offset, doc_start
        )
    qkv = qkv.to(_host.autocast_dtype(qkv))
    scale = attention_scale(scale, head_size)
    seed = _host.drawn_seed(seed, dropout_p, qkv.device)
    return _attention_qkvpacked_op(
        qkv, n_head, seed, doc_start, causal, scale, dropout_p, dropout_offset
    )[0]
