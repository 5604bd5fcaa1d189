"""Device functions shared by several kernels: rounded division, GELU, the dropout mask."""

import triton
import triton.language as tl


@triton.jit
def rounded_quotient(x, y):
    """x / y of blocks or scalars of one float dtype, rounded once. In float32, ``/`` multiplies by
    an approximate reciprocal, so that x / x may differ from 1; adding the remainder, which an FMA
    computes exactly, corrects this. NaN if x, y or the quotient is not finite. ``tl.div_rn`` is a
    subroutine and needs more registers."""
    quotient = x / y
    return quotient + tl.fma(-quotient, y, x) / y


@triton.jit
def _exp_half_square(x):
    """exp(-x² / 2). tl.exp2 is one instruction; tl.exp also handles results below 2^-126."""
    return tl.exp2(-0.7213475204444817 * x * x)


@triton.jit
def _normal_cdf(x, exp_half_square, FAST: tl.constexpr):
    """Phi(x). FAST is Abramowitz & Stegun 7.1.26, for half precision and GEMM epilogues: less than
    half of erf's instructions, error below 3e-7. Its quotient is the square of tl.rsqrt, one
    instruction instead of a division's five. The GPU's rsqrt may err by 2^-22.4, which raises the
    error to at most 1e-6."""
    if FAST:
        root = tl.rsqrt(1.0 + 0.2316418882663604 * tl.abs(x))
        t = root * root
        p = -0.7265760135 + t * 0.5307027145
        p = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * p))
        upper_tail = t * p * exp_half_square
        cdf = tl.where(x > 0.0, 1.0 - upper_tail, upper_tail)
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return cdf


@triton.jit
def _tanh_weight(x, FAST: tl.constexpr):
    """The factor of x in the tanh form: (1 + tanh(u)) / 2, which equals sigmoid(2u)."""
    twice_u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    if FAST:
        root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * twice_u))
        weight = root * root
    else:
        weight = tl.sigmoid(twice_u)
    return weight


@triton.jit
def gelu_value(x, TANH: tl.constexpr, FAST: tl.constexpr):
    """GELU of a block in accumulator precision."""
    if TANH:
        y = x * _tanh_weight(x, FAST)
    else:
        y = x * _normal_cdf(x, _exp_half_square(x), FAST)
    return y


@triton.jit
def gelu_slope(x, TANH: tl.constexpr, FAST: tl.constexpr):
    """The derivative of ``gelu_value``."""
    if TANH:
        s = _tanh_weight(x, FAST)
        slope = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        exp_half_square = _exp_half_square(x)
        slope = _normal_cdf(x, exp_half_square, FAST) + x * 0.3989422804014327 * exp_half_square
    return slope


@triton.jit
def dropout_keep(
    seed,
    dropout_offset,
    plane,
    start_col,
    offs_row,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bool mask (BLOCK_M, BLOCK_N), True for the kept elements of a tile of matrix ``plane``.

    One Philox 4x32-10 block (Salmon et al. 2011) yields 16 bits for each of eight adjacent columns;
    see ``reference.dropout_mask``. The bits depend only on seed, dropout_offset and position, so
    forward and backward agree whatever their tiles.
    """
    c0 = (start_col // 8 + tl.arange(0, BLOCK_N // 8))[None, :]
    c0, c1 = tl.broadcast(c0, offs_row[:, None])
    c2, c3 = tl.zeros_like(c0) + plane, tl.zeros_like(c0) + dropout_offset
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    k0 = tl.join((w0 & 0xFFFF) >= threshold, (w0 >> 16) >= threshold)
    k1 = tl.join((w1 & 0xFFFF) >= threshold, (w1 >> 16) >= threshold)
    k2 = tl.join((w2 & 0xFFFF) >= threshold, (w2 >> 16) >= threshold)
    k3 = tl.join((w3 & 0xFFFF) >= threshold, (w3 >> 16) >= threshold)
    # The last three dimensions are (half, high bit of the word, low bit of the word).
    keep = tl.join(tl.join(k0, k2), tl.join(k1, k3))
    return tl.reshape(keep, [BLOCK_M, BLOCK_N])
