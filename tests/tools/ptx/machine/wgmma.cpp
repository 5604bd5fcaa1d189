// wgmma: products of a warp group, of matrices in shared memory, under way until they are waited
// for. Results are computed at once and kept from being read; operands are kept from being written.
#include <cstring>

#include "tensor_cores.h"

namespace ptx {
namespace {

// "Matrix descriptor format" of the PTX manual. Offsets are between blocks of 8 rows of 16 bytes
// or of a swizzle's width.
struct Descriptor {
  u32 start, leading, stride;
  int swizzle;
  explicit Descriptor(u64 d)
      : start((d & 0x3fff) << 4),
        leading((d >> 16 & 0x3fff) << 4),
        stride((d >> 32 & 0x3fff) << 4),
        swizzle(d >> 62) {}

  // Of element (line, k), line being a row of A or a column of B. A transposed operand lies with
  // neighbouring lines side by side, another one with neighbouring k.
  u32 address(u32 line, u32 k, u32 bytes, bool transposed) const {
    u32 width = swizzle_bytes(swizzle), at;
    if (!transposed) {
      at = line / 8 * stride + line % 8 * width;
      at += swizzle == NO_SWIZZLE ? k * bytes / 16 * leading + k * bytes % 16 : k * bytes;
    } else {
      u32 per = width / bytes, line_step = swizzle == NO_SWIZZLE ? stride : leading;
      u32 k_step = swizzle == NO_SWIZZLE ? leading : stride;
      at = line / per * line_step + line % per * bytes + k / 8 * k_step + k % 8 * width;
    }
    return swizzled(start + at, swizzle);
  }
};

f32 shared_element(Warp& w, int type, u32 address) {
  u32 word = 0;
  std::memcpy(&word, &w.cta->shared[address], 4 / elements_a_word(type));
  return element(type, word, 0);
}

// Loads (lines, K) of the operand that a descriptor in a register names; out[line][k] or, for B,
// out[k][line]. False: some of it holds no value.
struct Matrix {
  int first_line, lines, k_size, type;
  bool transposed;
};
bool load_matrix(Warp& w, s32 r, const Matrix& m, f32* out, int line_stride, int k_stride) {
  require_defined(w, r, "a matrix descriptor");
  const u64* lanes = w.lanes<u64>(r);
  for (int l = 1; l < 32; l++)
    if (lanes[l] != lanes[0]) report(w, "wgmma", "the descriptor differs between lanes");
  if (lanes[0] >> 49 & 7) report(w, "wgmma", "a descriptor with a base offset is unknown here");
  Descriptor descriptor(lanes[0]);
  int bytes = 4 / elements_a_word(m.type), a_row = 16 / bytes;
  bool holds_value = true;
  for (int line = 0; line < m.lines; line++)
    for (int k = 0; k < m.k_size; k++) {
      u32 address = descriptor.address(m.first_line + line, k, bytes, m.transposed);
      if (!in_shared(w, address, bytes)) {
        report(w, "shared-bounds", text("wgmma reads shared 0x%x", address));
        holds_value = false;
        continue;
      }
      if ((m.transposed ? line : k) % a_row == 0) {
        holds_value &= read_shared(w, address, 16, NO_LANE, true);
        begin_async_read(w, {address, 16});
        w.wgmma_open.reads.push_back({address, 16});
      }
      out[line * line_stride + k * k_stride] = shared_element(w, m.type, address);
    }
  return holds_value;
}

void require_fenced(Warp& w, s32 r, const char* what) {
  if (w.fence_epoch == FIRST_FENCE_EPOCH)
    report(w, "wgmma-fence", "a wgmma with no wgmma.fence before it");
  else if (w.written_epoch[r] == w.fence_epoch)
    report(w, "wgmma-fence", text("%s was in use after the last wgmma.fence", what));
}

enum Flags {
  A_IN_REGISTERS = 1,
  A_TRANSPOSED = 2,
  B_TRANSPOSED = 4,
  D_IS_ZERO = 8,
  D_BY_PREDICATE = 16
};

// D (64, N) = A (64, K) B (K, N) [+ D], of which a warp has 16 rows. Operands: D, A as 4 registers
// or a descriptor, B's descriptor, the predicate that D counts. Immediates: type, N, flags, K.
void wgmma(Warp& w, const Instruction& i) {
  require_converged(w, "wgmma");
  int type = i.imm[0], n = i.imm[1], flags = i.imm[2], k_size = i.imm[3], n_d = n / 2;
  const s32 *a_op = i.op + n_d, *b_op = a_op + (flags & A_IN_REGISTERS ? 4 : 1);
  bool zero = flags & D_IS_ZERO;
  if (flags & D_BY_PREDICATE) {
    require_defined(w, b_op[1], "wgmma's scale-d");
    u32 scale = w.predicate(b_op[1]);
    if (scale != 0 && scale != ALL_LANES) report(w, "wgmma", "scale-d differs between lanes");
    zero = scale == 0;
  }
  u32 defined = ALL_LANES;
  for (int r = 0; r < n_d; r++) {
    if (!zero) defined &= w.defined[i.op[r]];
    require_fenced(w, i.op[r], "the accumulator");
  }

  static thread_local f32 a[16][32], b[32][256], c[16][256];
  bool holds_value = true;
  if (flags & A_IN_REGISTERS) {
    for (int r = 0; r < 4; r++) {
      defined &= w.defined[a_op[r]];
      require_fenced(w, a_op[r], "operand A");
      if (w.wgmma_results[a_op[r]])
        report(w, "wgmma-result", "operand A is the result of a wgmma under way");
      if (w.wgmma_operands[a_op[r]]++ == 0) w.n_wgmma_registers++;
      w.wgmma_open.operands_a.push_back(a_op[r]);
    }
    unpack_rows(w, a_op, 4, type, &a[0][0], 32);
  } else {
    Matrix m{16 * (w.id % 4), 16, k_size, type, bool(flags & A_TRANSPOSED)};
    holds_value &= load_matrix(w, a_op[0], m, &a[0][0], 32, 1);
  }
  Matrix m{0, n, k_size, type, bool(flags & B_TRANSPOSED)};
  holds_value &= load_matrix(w, b_op[0], m, &b[0][0], 1, 256);

  auto cell = [&](int r, int l) -> f32& {
    return c[l / 4 + 8 * (r / 2 & 1)][8 * (r / 4) + 2 * (l % 4) + (r & 1)];
  };
  for (int r = 0; r < n_d; r++)
    for (int l = 0; l < 32; l++) cell(r, l) = zero ? 0.f : w.lanes<f32>(i.op[r])[l];
  multiply(c, &a[0][0], 32, &b[0][0], 256, n, k_size, std::min(k_size, 16));
  for (int r = 0; r < n_d; r++) {
    s32 d = i.op[r];
    for (int l = 0; l < 32; l++) w.lanes<f32>(d)[l] = cell(r, l);
    // Not set_defined: the next wgmma on the same accumulators needs no fence.
    w.defined[d] = holds_value && defined == ALL_LANES ? ALL_LANES : 0;
    if (w.wgmma_results[d]++ == 0) w.n_wgmma_registers++;
    w.wgmma_open.results.push_back(d);
  }
}

void commit(Warp& w, const Instruction&) {
  require_converged(w, "wgmma.commit_group");
  w.wgmma_groups.push_back(std::move(w.wgmma_open));
  w.wgmma_open = WgmmaGroup();
}

// imm[0]: groups that may still be under way
void wait(Warp& w, const Instruction& i) {
  require_converged(w, "wgmma.wait_group");
  while (w.wgmma_groups.size() > size_t(i.imm[0])) {
    const WgmmaGroup& group = w.wgmma_groups.front();
    end_async_reads(w, group.reads);
    for (int r : group.results) {
      w.n_wgmma_registers -= --w.wgmma_results[r] == 0;
      w.written_epoch[r] = w.fence_epoch;  // they may be read now, which needs a fence as well
    }
    for (int r : group.operands_a) w.n_wgmma_registers -= --w.wgmma_operands[r] == 0;
    w.wgmma_groups.pop_front();
  }
}

}  // namespace

void add_wgmma(Table& t) {
  t["wgmma"] = wgmma;
  t["wgmma.fence"] = [](Warp& w, const Instruction&) { w.fence_epoch++; };
  t["wgmma.commit_group"] = commit;
  t["wgmma.wait_group"] = wait;
}

}  // namespace ptx
