"""Small kernels for testing the test tools. (Triton needs a kernel's source file.)"""

import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr = tl.float32,
):  # fmt: skip
    """C = A @ B, row-major; operands and C have their own dtypes, sums are in ACC."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start_k in range(0, K, BLOCK_K):
        k = start_k + offs_k
        mask_a = (offs_m[:, None] < M) & (k[None, :] < K)
        mask_b = (k[:, None] < K) & (offs_n[None, :] < N)
        a = tl.load(a_ptr + offs_m[:, None] * K + k[None, :], mask=mask_a, other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + offs_n[None, :], mask=mask_b, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)
    mask_c = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    c = acc.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + offs_m[:, None] * N + offs_n[None, :], c, mask=mask_c)


@triton.jit
def copy_tile_kernel(x_ptr, y_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y = x through a tensor descriptor, which sm_90 loads by TMA."""
    x = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    y = tl.make_tensor_descriptor(y_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    offs_m, offs_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    y.store([offs_m, offs_n], x.load([offs_m, offs_n]))


# ------------------------------------------------------------------------------------ language


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out: eleven rows of n, one per operation, in the operands' dtype."""
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=1.0)
    y = tl.load(y_ptr + offs, mask=mask, other=1.0)
    tl.store(out_ptr + 0 * n + offs, x + y, mask=mask)
    tl.store(out_ptr + 1 * n + offs, x - y, mask=mask)
    tl.store(out_ptr + 2 * n + offs, x * y, mask=mask)
    tl.store(out_ptr + 3 * n + offs, (x / y).to(x.dtype), mask=mask)
    tl.store(out_ptr + 4 * n + offs, -x, mask=mask)
    tl.store(out_ptr + 5 * n + offs, tl.maximum(x, y), mask=mask)
    tl.store(out_ptr + 6 * n + offs, tl.minimum(x, y), mask=mask)
    tl.store(out_ptr + 7 * n + offs, tl.where(x < y, x, y), mask=mask)
    tl.store(out_ptr + 8 * n + offs, tl.abs(x), mask=mask)
    tl.store(out_ptr + 9 * n + offs, x * 2.5, mask=mask)
    tl.store(out_ptr + 10 * n + offs, tl.clamp(x, -0.5, 0.5), mask=mask)


@triton.jit
def cast_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = x in the dtype of out."""
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def reduce_kernel(
    x_ptr, sum_ptr, max_ptr, argmax_ptr, cumsum_ptr, M: tl.constexpr, N: tl.constexpr
):
    """Sum, maximum, argmax and cumulative sum along the rows of x (M, N)."""
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    offs = offs_m[:, None] * N + offs_n[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(sum_ptr + offs_m, tl.sum(x, axis=1))
    tl.store(max_ptr + offs_m, tl.max(x, axis=1))
    tl.store(argmax_ptr + offs_m, tl.argmax(x, axis=1))
    tl.store(cumsum_ptr + offs, tl.cumsum(x, axis=1))


@triton.jit
def unary_kernel(x_ptr, exp_ptr, exp2_ptr, erf_ptr, rsqrt_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(exp_ptr + offs, tl.exp(x))
    tl.store(exp2_ptr + offs, tl.exp2(x))
    tl.store(erf_ptr + offs, tl.erf(x))
    tl.store(rsqrt_ptr + offs, tl.rsqrt(tl.abs(x)))


@triton.jit
def philox_kernel(seed_ptr, out_ptr, BLOCK: tl.constexpr):
    """out: (4, BLOCK) int64, the words for the counters (offs, offs + 1, offs + 2, 7)."""
    offs = tl.arange(0, BLOCK)
    sevens = tl.full([BLOCK], 7, tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), offs, offs + 1, offs + 2, sevens)
    tl.store(out_ptr + offs, w0.to(tl.int64))
    tl.store(out_ptr + BLOCK + offs, w1.to(tl.int64))
    tl.store(out_ptr + 2 * BLOCK + offs, w2.to(tl.int64))
    tl.store(out_ptr + 3 * BLOCK + offs, w3.to(tl.int64))


@triton.jit
def shapes_kernel(x_ptr, trans_ptr, joined_ptr, M: tl.constexpr, N: tl.constexpr):
    """x (M, N) → its transpose (N, M), and (M, 2N) with x and -x alternating."""
    offs_m, offs_n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + offs_m[:, None] * N + offs_n[None, :])
    tl.store(trans_ptr + offs_n[:, None] * M + offs_m[None, :], tl.trans(x))
    joined = tl.reshape(tl.join(x, -x), [M, 2 * N])
    offs_joined = offs_m[:, None] * 2 * N + tl.arange(0, 2 * N)[None, :]
    tl.store(joined_ptr + offs_joined, joined)


@triton.jit
def _scaled_and_shifted(x, shift, SCALE: tl.constexpr, NEGATE: tl.constexpr):
    if NEGATE:
        scaled = -x * SCALE
    else:
        scaled = x * SCALE
    return scaled, x + shift


@triton.jit
def _sum_of_both(x, shift, SCALE: tl.constexpr, NEGATE: tl.constexpr = False):
    scaled, shifted = _scaled_and_shifted(x, shift, SCALE, NEGATE)
    return scaled + shifted


@triton.jit
def helpers_kernel(x_ptr, bounds_ptr, out_ptr, n, SCALE: tl.constexpr, NEGATE: tl.constexpr):
    """out += helper(x) for i in range(bounds[0], bounds[1]), bounds in device memory."""
    tl.assume(n > 0)
    offs = tl.arange(0, 16)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    acc = tl.zeros([16], dtype=tl.float32)
    for i in range(tl.load(bounds_ptr), tl.load(bounds_ptr + 1)):
        acc += _sum_of_both(x, i, SCALE, NEGATE=NEGATE)
    tl.store(out_ptr + offs, acc, mask=mask)


@triton.jit
def arguments_kernel(out_ptr, number, flag, optional_ptr, large):
    """out: float64, the values of the runtime arguments inside the kernel."""
    tl.store(out_ptr, number.to(tl.float64))
    tl.store(out_ptr + 1, flag.to(tl.float64))
    if optional_ptr is None:
        tl.store(out_ptr + 2, 1.0)
    tl.store(out_ptr + 3, large.to(tl.float64))


@triton.jit
def program_kernel(out_ptr):
    """out[program] = program, over a three-dimensional grid."""
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    program = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out_ptr + program, program)


# -------------------------------------------------------------------------------------- faults


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, MASK_LOAD: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    """y[:n] = x[:n], correct with MASK_LOAD and OTHER; the sum goes to y[n]."""
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    if not MASK_LOAD:
        x = tl.load(x_ptr + offs)
    elif OTHER:
        x = tl.load(x_ptr + offs, mask=mask, other=0)
    else:
        x = tl.load(x_ptr + offs, mask=mask)
    tl.store(y_ptr + offs, x, mask=mask)
    tl.store(y_ptr + n, tl.sum(x, axis=0).to(x.dtype))


@triton.jit
def store_kernel(y_ptr, stride_program, stride_lane, value_step, BLOCK: tl.constexpr):
    """y[program * stride_program + lane * stride_lane] = lane * value_step"""
    lane = tl.arange(0, BLOCK)
    offs = tl.program_id(0) * stride_program + lane * stride_lane
    tl.store(y_ptr + offs, (lane * value_step).to(y_ptr.dtype.element_ty))


@triton.jit
def pass_on_kernel(x_ptr, reach):
    """x[program] = x[program + reach] + 1: a race unless reach is 0."""
    program = tl.program_id(0)
    tl.store(x_ptr + program, tl.load(x_ptr + program + reach) + 1)


@triton.jit
def store_then_load_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """x += 1, then y = x reversed, with no barrier between."""
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs) + 1)
    tl.store(y_ptr + offs, tl.load(x_ptr + BLOCK - 1 - offs))


@triton.jit
def offset_kernel(x_ptr, y_ptr, row, stride, WIDE: tl.constexpr):
    """y[0] = x[row * stride - row * stride], where the product needs more than 32 bits."""
    if WIDE:
        row = tl.cast(row, tl.int64)
    offset = row * stride - row * stride
    tl.store(y_ptr, tl.load(x_ptr + offset))


@triton.jit
def order_kernel(next_ptr, turn_ptr):
    """turn[program] = how many programs ran before (a race, on purpose)."""
    turn = tl.load(next_ptr)
    tl.store(turn_ptr + tl.program_id(0), turn)
    tl.store(next_ptr, turn + 1)


@triton.jit
def hold_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Keeps a block of BLOCK elements alive over a loop."""
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], dtype=tl.float32)
    for i in range(n):
        acc += tl.load(x_ptr + i * BLOCK + offs)
    tl.store(y_ptr + offs, acc)


@triton.jit
def copy_by_descriptor_kernel(x_desc, y_desc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """y = x through tensor descriptors made on the host."""
    offs_m, offs_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    y_desc.store([offs_m, offs_n], x_desc.load([offs_m, offs_n]))


@triton.jit
def contraction_kernel(x_ptr, y_ptr, z_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out: five rows of n, sums and differences that contain products."""
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=1.0)
    y = tl.load(y_ptr + offs, mask=mask, other=1.0)
    z = tl.load(z_ptr + offs, mask=mask, other=1.0)
    tl.store(out_ptr + 0 * n + offs, x * y + z, mask=mask)
    tl.store(out_ptr + 1 * n + offs, x * y - z, mask=mask)
    tl.store(out_ptr + 2 * n + offs, z - x * y, mask=mask)
    tl.store(out_ptr + 3 * n + offs, tl.where(mask, x * y, 0.0) + z, mask=mask)
    tile = z[None, :] - (x * y)[None, :]  # (1, BLOCK)
    tl.store(out_ptr + 4 * n + offs, tl.sum(tile, axis=0), mask=mask)


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + offs), tl.load(y_ptr + offs), tl.load(z_ptr + offs)
    tl.store(out_ptr + offs, tl.fma(x, y, z))
