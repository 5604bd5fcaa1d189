// mma.sync, ldmatrix and stmatrix.
#include "tensor_cores.h"

#include <cstring>

namespace ptx {
namespace {

// D (16, 8) = A (16, K) B (K, 8) + C. Operands: 4 of D, A, B, 4 of C. Immediates: type, K.
void mma(Warp& w, const Instruction& i) {
  check_not_in_flight(w, i);
  require_converged(w, "mma.sync");
  int type = i.imm[0], k_size = i.imm[1], per = elements_a_word(type);
  int n_a = k_size / 2 / per, n_b = k_size / 4 / per;
  const s32 *a_registers = i.op + 4, *b_registers = a_registers + n_a,
            *c_registers = b_registers + n_b;
  u32 defined = ALL_LANES;
  for (int k = 4; k < i.count; k++) defined &= w.defined[i.op[k]];

  static thread_local f32 a[16][32], b[32][8], c[16][8];
  unpack_rows(w, a_registers, n_a, type, &a[0][0], 32);
  for (int r = 0; r < n_b; r++)
    for (int l = 0; l < 32; l++)
      for (int e = 0; e < per; e++)
        b[(r * 4 + l % 4) * per + e][l / 4] = element(type, w.lanes<u32>(b_registers[r])[l], e);
  for (int r = 0; r < 4; r++)
    for (int l = 0; l < 32; l++)
      c[l / 4 + 8 * (r / 2)][l % 4 * 2 + (r & 1)] = w.lanes<f32>(c_registers[r])[l];
  multiply(c, &a[0][0], 32, &b[0][0], 8, 8, k_size, std::min(k_size, 8));
  for (int r = 0; r < 4; r++) {
    for (int l = 0; l < 32; l++)
      w.lanes<f32>(i.op[r])[l] = c[l / 4 + 8 * (r / 2)][l % 4 * 2 + (r & 1)];
    set_defined(w, i.op[r],
                defined == ALL_LANES ? ALL_LANES : 0);  // every sum has every lane's part
  }
}

// The address of row `row` of matrix `matrix`, which lane 8 matrix + row gives; false: reported.
bool row_address(Warp& w, const Instruction& i, int matrix, int row, u64& address) {
  int lane = 8 * matrix + row;
  address = number(w, i.op[i.count - 1], lane) + i.imm[0];
  if (!is_aligned(w, address, 16, lane)) return false;
  if (in_shared(w, address, 16)) return true;
  report(w, "shared-bounds", text("a matrix row at 0x%llx", (unsigned long long)address));
  return false;
}

// Which lane holds element (row, column), and in which half of its register.
struct Place {
  int lane, half;
  Place(int row, int column, bool transposed) {
    if (transposed) std::swap(row, column);
    lane = row * 4 + column / 2, half = column & 1;
  }
};

// Operands: a register a matrix of 8 x 8 x 16 bits, the address. Immediates: offset, transposed.
void ldmatrix(Warp& w, const Instruction& i) {
  check_not_in_flight(w, i);
  require_converged(w, "ldmatrix");
  require_defined(w, i.op[i.count - 1], "an address");
  u32 values[4][32] = {}, undefined[4] = {};
  for (int m = 0; m < i.count - 1; m++)
    for (int row = 0; row < 8; row++) {
      u64 address;
      if (!row_address(w, i, m, row, address)) continue;
      bool whole = read_shared(w, address, 16, NO_LANE);
      u16 elements[8];
      std::memcpy(elements, &w.cta->shared[address], 16);
      for (int column = 0; column < 8; column++) {
        Place place(row, column, i.imm[1]);
        values[m][place.lane] |= u32(elements[column]) << 16 * place.half;
        if (!whole && !read_shared(w, address + 2 * column, 2, NO_LANE))
          undefined[m] |= 1u << place.lane;
      }
    }
  for (int m = 0; m < i.count - 1; m++) {
    std::memcpy(w.lanes<u32>(i.op[m]), values[m], sizeof values[m]);
    set_defined(w, i.op[m], ~undefined[m]);
  }
}

void stmatrix(Warp& w, const Instruction& i) {
  check_not_in_flight(w, i);
  require_converged(w, "stmatrix");
  require_defined(w, i.op[i.count - 1], "an address");
  for (int m = 0; m < i.count - 1; m++) {
    const u32* words = w.lanes<u32>(i.op[m]);
    for (int row = 0; row < 8; row++) {
      u64 address;
      if (!row_address(w, i, m, row, address)) continue;
      u16 elements[8];
      bool defined = true;
      for (int column = 0; column < 8; column++) {
        Place place(row, column, i.imm[1]);
        elements[column] = u16(words[place.lane] >> 16 * place.half);
        defined &= w.defined[i.op[m]] >> place.lane & 1;
      }
      write_shared(w, address, reinterpret_cast<const u8*>(elements), 16, 32 + row, defined);
    }
  }
}

}  // namespace

void add_tensor_cores(Table& t) {
  t["mma"] = mma;
  t["ldmatrix"] = ldmatrix;
  t["stmatrix"] = stmatrix;
}

}  // namespace ptx
