// Number formats and the arithmetic that x86 does not do the way a GPU does.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ptx {

using u8 = uint8_t;
using s8 = int8_t;
using u16 = uint16_t;
using s16 = int16_t;
using u32 = uint32_t;
using s32 = int32_t;
using u64 = uint64_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
using std::bit_cast;

// ---------------------------------------------------------------------------- 16 and 8 bits

inline f32 half_to_float(u16 h) {
  u32 sign = u32(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<f32>(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  f32 value = bit_cast<f32>(magnitude << 13) * 0x1p112f;  // moves the exponent's bias
  return bit_cast<f32>(sign | bit_cast<u32>(value));
}

inline u16 float_to_half(f32 f) {  // to nearest even
  u32 bits = bit_cast<u32>(f), magnitude = bits & 0x7fffffff;
  u16 sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000)                         // a subnormal is a multiple of 2^-24
    return sign | u16(std::nearbyintf(bit_cast<f32>(magnitude) * 0x1p24f));
  magnitude += 0xfff + (magnitude >> 13 & 1);
  return sign | u16((magnitude - (112u << 23)) >> 13);
}

inline f32 bfloat_to_float(u16 b) { return bit_cast<f32>(u32(b) << 16); }

inline u16 float_to_bfloat(f32 f) {  // to nearest even
  if (f != f) return 0x7fff;
  u32 bits = bit_cast<u32>(f);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

struct Half {
  static f32 wide(u16 x) { return half_to_float(x); }
  static u16 narrow(f32 x) { return float_to_half(x); }
};
struct Bfloat {
  static f32 wide(u16 x) { return bfloat_to_float(x); }
  static u16 narrow(f32 x) { return float_to_bfloat(x); }
};

// float64 → float32 with the last bit set where something was cut off: rounding that once more to
// 16 bits gives what rounding the float64 itself would.
inline f32 round_to_odd(f64 x) {
  f32 r = f32(x);
  if (x != x || f64(r) == x || std::isinf(x)) return r;
  if (bit_cast<u32>(r) & 1) return r;
  return std::nextafterf(r, f64(r) < x ? HUGE_VALF : -HUGE_VALF);
}

inline f32 e5m2_to_float(u8 x) { return half_to_float(u16(x) << 8); }

inline f32 e4m3_to_float(u8 x) {
  int exponent = x >> 3 & 15, mantissa = x & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<f32>::quiet_NaN();
  f32 value =
      exponent ? std::ldexp(1 + mantissa / 8.f, exponent - 7) : std::ldexp(mantissa / 8.f, -6);
  return x >> 7 ? -value : value;
}

// To nearest even, and to the largest number beyond it (satfinite).
inline u8 float_to_fp8(f32 f, int mantissa_bits, int bias, f32 largest) {
  if (f != f) return 0x7f;
  u8 sign = std::signbit(f) ? 0x80 : 0;
  f64 value = std::fmin(std::fabs(f64(f)), largest);
  int exponent = value == 0 ? 1 - bias : std::max(std::ilogb(value), 1 - bias);
  u32 steps = u32(std::nearbyint(std::ldexp(value, mantissa_bits - exponent)));
  // A subnormal has exponent field 0, which the lack of the leading one makes by itself.
  u32 code = (u32(exponent + bias - 1) << mantissa_bits) + steps;
  u32 top = largest == 448.f ? 0x7e : 0x7b;
  return sign | u8(std::min(code, top));
}
inline u8 float_to_e4m3(f32 f) { return float_to_fp8(f, 3, 7, 448.f); }
inline u8 float_to_e5m2(f32 f) { return float_to_fp8(f, 2, 15, 57344.f); }

// ------------------------------------------------------------- float32 as the instructions do it

inline f32 flush(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

// The smaller or larger number; a NaN loses, and -0 is below +0.
template <class T>
T minimum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == 0 && b == 0) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <class T>
T maximum(T a, T b) {
  if (a != a) return b;
  if (b != b) return a;
  if (a == 0 && b == 0) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

// ----------------------------------------------------------------------- approximate functions
// As wrong as the PTX manual allows, in a way that depends on the operand alone: a kernel that
// needs more fails its test here, and the same launch gives the same bits.

inline u32 scramble(u32 x) {
  x ^= x >> 16;
  x *= 0x7feb352d;
  x ^= x >> 15;
  x *= 0x846ca68b;
  return x ^ x >> 16;
}

// `relative`: the largest relative error. A result that a float32 holds comes out exactly.
inline f32 approximate(f64 exact, u32 operand, f64 relative) {
  if (std::isfinite(exact) && f64(f32(exact)) != exact)
    exact *= 1 + relative * (s32(scramble(operand)) / 2147483648.0);
  return f32(exact);
}

inline f32 exp2_approx(f32 a) {
  return approximate(std::exp2(f64(a)), bit_cast<u32>(a), a == std::floor(a) ? 0 : 0x1p-22);
}
inline f32 rsqrt_approx(f32 a) {
  return approximate(1 / std::sqrt(f64(a)), bit_cast<u32>(a), std::exp2(-22.4));
}
inline f32 sqrt_approx(f32 a) { return approximate(std::sqrt(f64(a)), bit_cast<u32>(a), 0x1p-23); }
inline f32 log2_approx(f32 a) { return approximate(std::log2(f64(a)), bit_cast<u32>(a), 0x1p-22); }
inline f32 tanh_approx(f32 a) { return approximate(std::tanh(f64(a)), bit_cast<u32>(a), 0x1p-11); }

// The reciprocal, correctly rounded or a neighbour within one unit in the last place.
inline f32 reciprocal_approx(f32 b) {
  f64 exact = 1 / f64(b);
  f32 rounded = f32(exact);
  if (!std::isfinite(rounded) || rounded == 0 || f64(rounded) == exact) return rounded;
  u32 choice = scramble(bit_cast<u32>(b)) % 3;
  if (choice == 0) return rounded;
  f32 neighbour = std::nextafterf(rounded, choice == 1 ? -HUGE_VALF : HUGE_VALF);
  f64 ulp = std::fabs(f64(std::nextafterf(rounded, HUGE_VALF)) - rounded);
  return std::fabs(neighbour - exact) <= ulp ? neighbour : rounded;
}

// Of the upper 32 bits of the operand, with the lower 32 bits of the result 0: what the compiler's
// library refines to a quotient or a logarithm.
inline f64 upper_half(f64 x) { return bit_cast<f64>(bit_cast<u64>(x) >> 32 << 32); }
inline f64 reciprocal_approx(f64 x) { return upper_half(1 / upper_half(x)); }

// Beyond 2^126 the reciprocal counts as 0.
inline f32 divide_approx(f32 a, f32 b) {
  return a * (std::fabs(b) > 0x1p126f ? std::copysign(0.0f, b) : reciprocal_approx(b));
}

// div.full multiplies with a reciprocal; outside of these bounds it scales first.
inline f32 divide_full(f32 a, f32 b) {
  f32 size = std::fabs(b);
  bool plain = std::isfinite(a) && size < 0x1p126f && size > 0x1p-126f;
  return plain ? a * reciprocal_approx(b) : f32(f64(a) / b);
}

}  // namespace ptx
