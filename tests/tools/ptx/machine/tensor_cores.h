// What mma.sync and wgmma share: element types, and the order in which products are summed.
#pragma once
#include "memory.h"

namespace ptx {

enum ElementType { F16, BF16, TF32, E4M3, E5M2 };  // the order is that of instructions.py

inline int elements_a_word(int type) { return type == TF32 ? 1 : type >= E4M3 ? 4 : 2; }

inline f32 element(int type, u32 word, int k) {
  switch (type) {
    case F16: return half_to_float(u16(word >> 16 * k));
    case BF16: return bfloat_to_float(u16(word >> 16 * k));
    case TF32: return bit_cast<f32>(word & 0xffffe000u);
    case E4M3: return e4m3_to_float(u8(word >> 8 * k));
    default: return e5m2_to_float(u8(word >> 8 * k));
  }
}

// What a tensor core may make of it: the products exact, their sum with the accumulator cut off.
inline f32 accumulate(f32 accumulator, f64 products) {
  f64 exact = f64(accumulator) + products;
  f32 rounded = f32(exact);
  bool away_from_zero = std::isfinite(rounded) && std::fabs(f64(rounded)) > std::fabs(exact);
  return away_from_zero ? std::nextafterf(rounded, 0.f) : rounded;
}

// C (16, N) += A (16, K) B (K, N), `step` products at a time.
template <int N_MAX>
void multiply(f32 (&c)[16][N_MAX], const f32* a, int a_stride, const f32* b, int b_stride, int n,
              int k_size, int step) {
  for (int row = 0; row < 16; row++)
    for (int k0 = 0; k0 < k_size; k0 += step) {
      f64 sums[N_MAX] = {};
      for (int k = k0; k < k0 + step; k++)
        for (int j = 0; j < n; j++) sums[j] += f64(a[row * a_stride + k]) * b[k * b_stride + j];
      for (int j = 0; j < n; j++) c[row][j] = accumulate(c[row][j], sums[j]);
    }
}

// Operand A of 16 rows in the lanes' registers: lane 4g + q has row g and, in odd registers, g + 8.
inline void unpack_rows(Warp& w, const s32* registers, int n_registers, int type, f32* a,
                        int stride) {
  int per = elements_a_word(type);
  for (int r = 0; r < n_registers; r++) {
    const u32* words = w.lanes<u32>(registers[r]);
    for (int l = 0; l < 32; l++) {
      int row = l / 4 + 8 * (r & 1), k = (r / 2 * 4 + l % 4) * per;
      for (int e = 0; e < per; e++) a[row * stride + k + e] = element(type, words[l], e);
    }
  }
}

inline void require_converged(Warp& w, const char* what) {
  if (w.active != ALL_LANES) report(w, "divergence", text("%s with lanes %08x", what, w.active));
}

}  // namespace ptx
