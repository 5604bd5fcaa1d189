"""Attention for decoding: one new token per sequence attends to the cached keys and values.

    K[:, p] = k     V[:, p] = v     S = scale * q Kᵀ     O = softmax(S over keys 0 .. p) V

for each sequence b and head h, where p = positions[b] is the new token's position. The cache is
(2, B, H, S, D): K and V of up to S tokens. With one query, tensor cores do not help, and a batch
has too few heads to fill the GPU, so the keys are split (Flash-Decoding, Dao et al. 2023): each
program handles BLOCK_N adjacent keys of one head and writes their largest score, the sum of their
exponentials and the weighted sum of their values. A second kernel combines the parts of a head. The
program whose keys include p reads k and v from the input and writes them to the cache.

Positions are read on the device and the grid depends only on the cache's size, so one CUDA graph
can be replayed for every token. The split does not depend on the batch, and parts are added in a
fixed order: results are bitwise reproducible and the same alone or in a batch.

Bytes moved at s bytes per element: 2 s D (p + 1) per head, so it is memory-bound; the float32 parts
add a fraction of 2 / (s BLOCK_N). FLOPs: 4 D (p + 1) per head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import _checks, _host, configs
from fastgpt.kernels._attention import block_d, check_head_size
from fastgpt.kernels._tensors import attention_scale


@triton.jit
def _attention_decode_kernel(
    qkv_ptr, qkv_stride_b,  # (B, 3 * n_head * HEAD), columns adjacent
    cache_ptr,  # (2, B, n_head, n_slots, HEAD), contiguous; slot p of each head is written
    positions_ptr,  # (B)
    max_ptr, sum_ptr,  # (B, n_head, n_parts)
    acc_ptr,  # (B, n_head, n_parts, HEAD)
    n_head, n_slots, n_parts, qk_scale, value_offset,
    ACC: tl.constexpr, HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % n_parts
    batch_head = tl.program_id(0) // n_parts
    batch, head = (batch_head // n_head).to(tl.int64), batch_head % n_head
    position = tl.load(positions_ptr + batch)
    start_n = part * BLOCK_N
    # Parts after the new token are neither written nor read.
    if (position >= start_n) & (position < n_slots):
        offs_n, offs_d = start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        mask_d = offs_d < HEAD
        width = n_head * HEAD
        row_ptr = qkv_ptr + batch * qkv_stride_b + head * HEAD + offs_d
        q = tl.load(row_ptr, mask=mask_d, other=0.0).to(ACC)
        new_k = tl.load(row_ptr + width, mask=mask_d, other=0.0)
        new_v = tl.load(row_ptr + 2 * width, mask=mask_d, other=0.0)

        head_ptr = cache_ptr + batch_head.to(tl.int64) * n_slots * HEAD
        tile_ptrs = head_ptr + offs_n.to(tl.int64)[:, None] * HEAD + offs_d[None, :]
        mask = (offs_n < position)[:, None] & mask_d[None, :]
        is_new = (offs_n == position)[:, None]
        k = tl.load(tile_ptrs, mask=mask, other=0.0)
        v = tl.load(tile_ptrs + value_offset, mask=mask, other=0.0)
        k = tl.where(is_new, new_k[None, :], k)
        v = tl.where(is_new, new_v[None, :], v)
        if position < start_n + BLOCK_N:
            slot_ptr = head_ptr + position.to(tl.int64) * HEAD + offs_d
            tl.store(slot_ptr, new_k, mask=mask_d)
            tl.store(slot_ptr + value_offset, new_v, mask=mask_d)

        scores = tl.sum(q[None, :] * k.to(ACC), axis=1)
        scores = tl.where(offs_n <= position, scores, float("-inf"))
        largest = tl.max(scores, axis=0)
        # Subtract before scaling: the difference is exact near the maximum.
        probs = tl.exp2((scores - largest) * qk_scale)
        acc = tl.sum(probs[:, None] * v.to(ACC), axis=0)
        place = batch_head.to(tl.int64) * n_parts + part
        tl.store(max_ptr + place, largest)
        tl.store(sum_ptr + place, tl.sum(probs, axis=0))
        tl.store(acc_ptr + place * HEAD + offs_d, acc, mask=mask_d)


@triton.jit
def _attention_decode_sum_kernel(
    max_ptr, sum_ptr,  # (B, n_head, n_parts)
    acc_ptr,  # (B, n_head, n_parts, HEAD)
    positions_ptr,  # (B)
    out_ptr,  # (B, n_head * HEAD), contiguous
    n_head, n_slots, n_parts, qk_scale,
    ACC: tl.constexpr, HEAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + batch_head // n_head)
    # A position outside the cache has no parts: 0 / 0 gives NaN.
    inside = (position >= 0) & (position < n_slots)
    stop = tl.where(inside, position // BLOCK_N + 1, 0).to(tl.int32)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD
    largest = tl.full([1], float("-inf"), dtype=ACC)
    total = tl.zeros([1], dtype=ACC)
    acc = tl.zeros([BLOCK_D], dtype=ACC)
    for start in range(0, stop, PARTS):
        parts = start + tl.arange(0, PARTS)
        mask = parts < stop
        places = batch_head * n_parts + parts
        maxima = tl.load(max_ptr + places, mask=mask, other=float("-inf"))
        sums = tl.load(sum_ptr + places, mask=mask, other=0.0)
        accs_ptrs = acc_ptr + places[:, None] * HEAD + offs_d[None, :]
        accs = tl.load(accs_ptrs, mask=mask[:, None] & mask_d[None, :], other=0.0)
        new_largest = tl.maximum(largest, tl.max(maxima, axis=0))
        weights = tl.exp2((maxima - new_largest) * qk_scale)
        rescale = tl.exp2((largest - new_largest) * qk_scale)
        total = total * rescale + tl.sum(weights * sums, axis=0)
        acc = acc * rescale + tl.sum(weights[:, None] * accs, axis=0)
        largest = new_largest
    out = (acc / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + batch_head * HEAD + offs_d, out, mask=mask_d)


@torch.library.custom_op("fastgpt::attention_decode", mutates_args=("cache",))
def _attention_decode_op(qkv: Tensor, cache: Tensor, positions: Tensor, scale: float) -> Tensor:
    _, batch, n_head, n_slots, head_size = cache.shape
    out = torch.empty(batch, 1, n_head * head_size, dtype=qkv.dtype, device=qkv.device)
    if not batch:
        return out
    qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
    width = block_d(head_size)
    config = configs.find(qkv, "attention_decode", "fwd", width)
    n_parts = _host.cdiv(n_slots, config.BLOCK_N)
    # For each part of each head: the maximum, the sum and the weighted values.
    largest = qkv.new_empty(batch, n_head, n_parts, dtype=_host.stats_dtype(qkv.dtype))
    parts = largest, torch.empty_like(largest), largest.new_empty(*largest.shape, head_size)
    qk_scale = scale * _host.LOG2_E
    sizes = dict(ACC=_host.accumulator(qkv.dtype), HEAD=head_size, BLOCK_D=width)
    with _host.on_device(qkv):
        _attention_decode_kernel[(batch * n_head * n_parts,)](
            qkv,
            qkv.stride(0),
            cache,
            positions,
            *parts,
            n_head,
            n_slots,
            n_parts,
            qk_scale,
            cache.stride(0),
            **sizes,
            **configs.launch(config),
        )
        _attention_decode_sum_kernel[(batch * n_head,)](
            *parts,
            positions,
            out,
            n_head,
            n_slots,
            n_parts,
            qk_scale,
            BLOCK_N=config.BLOCK_N,
            **sizes,
            **configs.launch(configs.find(qkv, "attention_decode", "sum")),
        )
    return out


@_attention_decode_op.register_fake
def _(qkv, cache, positions, scale):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def attention_decode(
    qkv: Tensor, cache: Tensor, positions: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attention for one new token per sequence: ``attention_qkvpacked``'s result for the last token
    of the whole sequence, up to rounding. Writes its key and value to ``cache``. No gradients.

    Args:
        qkv: (B, 1, 3C), q, k and v side by side, each with its heads side by side; float32, float16
            or bfloat16, on a CUDA device.
        cache: (2, B, H, S, D), C = H * D, D at most 256: keys and values of up to S tokens;
            contiguous, of qkv's dtype and device. Modified in place.
        positions: (B,) int64 or int32, on the same device: the new token's position in the cache,
            from 0 to S - 1; all slots before it are filled. Values are checked on the CPU only,
            since a check on a GPU would make the host wait. There, a row whose position is out of
            range becomes NaN and leaves the cache unchanged.
        scale: factor applied to q kᵀ, positive; 1 / sqrt(D) if None.

    Returns:
        (B, 1, C) of qkv's dtype. Softmax and sums are float32.

    Raises:
        TypeError: qkv or cache is not a floating-point tensor, or positions not an integer tensor.
        ValueError: shapes, dtypes or devices do not match, or an argument is out of range.
    """
    _checks.attention_decode(qkv, cache, positions, scale)
    _host.launchable(qkv=qkv)
    head_size = cache.shape[4]
    check_head_size("cache", head_size)
    return _attention_decode_op(qkv, cache, positions, attention_scale(scale, head_size))
