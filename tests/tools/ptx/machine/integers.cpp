// Integer arithmetic, comparison and bits.
#include "registers.h"

namespace ptx {
namespace {

using s128 = __int128;

template <class T>
void add_arithmetic(Table& t, const std::string& type) {
  using U = std::make_unsigned_t<T>;
  constexpr int BITS = sizeof(T) * 8;
  auto add = [&](const char* name, auto f) { t[name + ("." + type)] = each_lane(f); };
  add("add", [](T a, T b) { return T(U(a) + U(b)); });
  add("sub", [](T a, T b) { return T(U(a) - U(b)); });
  add("mul.lo", [](T a, T b) { return T(u64(a) * u64(b)); });
  add("mad.lo", [](T a, T b, T c) { return T(u64(a) * u64(b) + u64(c)); });
  add("mul.hi", [](T a, T b) { return T((s128(a) * s128(b)) >> BITS); });
  add("mad.hi", [](T a, T b, T c) { return T(U((s128(a) * s128(b)) >> BITS) + U(c)); });
  add("min", [](T a, T b) { return a < b ? a : b; });
  add("max", [](T a, T b) { return a > b ? a : b; });
  add("neg", [](T a) { return T(-U(a)); });
  add("abs", [](T a) { return T(a < 0 ? -U(a) : U(a)); });
  // The quotient by 0 is undefined in PTX; GPUs give all ones.
  add("div", [](T a, T b) {
    if (b == 0) return T(-1);
    return std::is_signed_v<T> && b == T(-1) ? T(-U(a)) : T(a / b);
  });
  add("rem", [](T a, T b) {
    if (b == 0) return a;
    return std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
  });
  add("shr", [](T a, u32 n) { return n >= u32(BITS) ? T(a < 0 ? -1 : 0) : T(a >> n); });
}

template <class T>
void add_comparisons(Table& t, const std::string& type) {
  auto add = [&](const char* name, auto f) {
    t[text("setp.%s.%s", name, type.c_str())] = compare<T>(f);
  };
  add("eq", [](T a, T b) { return a == b; });
  add("ne", [](T a, T b) { return a != b; });
  add("lt", [](T a, T b) { return a < b; });
  add("le", [](T a, T b) { return a <= b; });
  add("gt", [](T a, T b) { return a > b; });
  add("ge", [](T a, T b) { return a >= b; });
}

template <class T>
void add_bits(Table& t, const std::string& type) {
  constexpr u32 BITS = sizeof(T) * 8;
  auto add = [&](const char* name, auto f) { t[name + ("." + type)] = each_lane(f); };
  add("and", [](T a, T b) { return T(a & b); });
  add("or", [](T a, T b) { return T(a | b); });
  add("xor", [](T a, T b) { return T(a ^ b); });
  add("not", [](T a) { return T(~a); });
  add("shl", [](T a, u32 n) { return T(n >= BITS ? 0 : a << n); });
  add("shr", [](T a, u32 n) { return T(n >= BITS ? 0 : a >> n); });
}

u32 extract_unsigned(u32 a, u32 position, u32 length) {
  position &= 255, length &= 255;
  if (length == 0 || position > 31) return 0;
  return length >= 32 ? a >> position : a >> position & ((1u << length) - 1);
}

s32 extract_signed(s32 a, u32 position, u32 length) {
  position &= 255, length &= 255;
  if (length == 0) return 0;
  bool sign = a >> std::min(position + length - 1, 31u) & 1;
  u32 out = 0;
  for (u32 k = 0; k < 32; k++) {
    bool bit = k < length && position + k < 32 ? a >> (position + k) & 1 : sign;
    out |= u32(bit) << k;
  }
  return s32(out);
}

u32 insert(u32 field, u32 into, u32 position, u32 length) {
  position &= 255, length &= 255;
  for (u32 k = 0; k < length && position + k < 32; k++)
    into = (into & ~(1u << (position + k))) | (field >> k & 1) << (position + k);
  return into;
}

u32 permute(u32 a, u32 b, u32 selectors) {
  u64 bytes = u64(b) << 32 | a;
  u32 out = 0;
  for (int k = 0; k < 4; k++) {
    u32 selector = selectors >> 4 * k & 15;
    u8 byte = u8(bytes >> 8 * (selector & 7));
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;  // the sign alone
    out |= u32(byte) << 8 * k;
  }
  return out;
}

// A source may be undefined if no byte of it is taken: so the compiler permutes a single register.
void permute_bytes(Warp& w, const Instruction& i) {
  const u32* selectors = w.lanes<u32>(i.op[3]);
  u32 takes_a = 0, takes_b = 0;
  for (int l = 0; l < 32; l++) {
    u32 from_b = selectors[l] & 0x4444;
    takes_a |= u32(from_b != 0x4444) << l;
    takes_b |= u32(from_b != 0) << l;
  }
  u32 a = w.defined[i.op[1]], b = w.defined[i.op[2]], s = w.defined[i.op[3]];
  each_lane([](u32 a, u32 b, u32 s) { return permute(a, b, s); })(w, i);
  set_defined(w, i.op[0], (a | ~takes_a) & (b | ~takes_b) & s);
}

// imm[0]: the truth table; bit 4a + 2b + c of it is the result for bits a, b, c.
void lop3(Warp& w, const Instruction& i) {
  check_not_in_flight(w, i);
  const u32 *a = w.lanes<u32>(i.op[1]), *b = w.lanes<u32>(i.op[2]), *c = w.lanes<u32>(i.op[3]);
  u32* out = w.lanes<u32>(i.op[0]);
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l)) continue;
    u32 value = 0;
    for (int k = 0; k < 8; k++)
      if (i.imm[0] >> k & 1)
        value |= (k & 4 ? a[l] : ~a[l]) & (k & 2 ? b[l] : ~b[l]) & (k & 1 ? c[l] : ~c[l]);
    out[l] = value;
  }
  set_defined(w, i.op[0], w.defined[i.op[1]] & w.defined[i.op[2]] & w.defined[i.op[3]]);
}

}  // namespace

void add_integers(Table& t) {
  add_arithmetic<s16>(t, "s16"), add_arithmetic<u16>(t, "u16");
  add_arithmetic<s32>(t, "s32"), add_arithmetic<u32>(t, "u32");
  add_arithmetic<s64>(t, "s64"), add_arithmetic<u64>(t, "u64");
  add_comparisons<s16>(t, "s16"), add_comparisons<u16>(t, "u16");
  add_comparisons<s32>(t, "s32"), add_comparisons<u32>(t, "u32");
  add_comparisons<s64>(t, "s64"), add_comparisons<u64>(t, "u64");
  add_bits<u16>(t, "b16"), add_bits<u32>(t, "b32"), add_bits<u64>(t, "b64");
  t["mul.wide.s16"] = each_lane([](s16 a, s16 b) { return s32(a) * s32(b); });
  t["mul.wide.u16"] = each_lane([](u16 a, u16 b) { return u32(a) * u32(b); });
  t["mul.wide.s32"] = each_lane([](s32 a, s32 b) { return s64(a) * s64(b); });
  t["mul.wide.u32"] = each_lane([](u32 a, u32 b) { return u64(a) * u64(b); });
  t["mad.wide.s32"] = each_lane([](s32 a, s32 b, s64 c) { return s64(u64(s64(a) * b) + u64(c)); });
  t["mad.wide.u32"] = each_lane([](u32 a, u32 b, u64 c) { return u64(a) * b + c; });
  t["min.relu.s32"] = each_lane([](s32 a, s32 b) { return std::max(std::min(a, b), 0); });
  t["max.relu.s32"] = each_lane([](s32 a, s32 b) { return std::max(std::max(a, b), 0); });
  t["bfe.u32"] = each_lane([](u32 a, u32 p, u32 n) { return extract_unsigned(a, p, n); });
  t["bfe.s32"] = each_lane([](s32 a, u32 p, u32 n) { return extract_signed(a, p, n); });
  t["bfi.b32"] = each_lane([](u32 a, u32 b, u32 p, u32 n) { return insert(a, b, p, n); });
  t["prmt.b32"] = permute_bytes;
  t["popc.b32"] = each_lane([](u32 a) { return u32(std::popcount(a)); });
  t["clz.b32"] = each_lane([](u32 a) { return u32(std::countl_zero(a)); });
  t["shf.l.wrap.b32"] = each_lane(
      [](u32 low, u32 high, u32 n) { return u32((u64(high) << 32 | low) << (n & 31) >> 32); });
  t["shf.r.wrap.b32"] =
      each_lane([](u32 low, u32 high, u32 n) { return u32((u64(high) << 32 | low) >> (n & 31)); });
  t["lop3.b32"] = lop3;
}

}  // namespace ptx
