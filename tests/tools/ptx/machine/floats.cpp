// Floating-point arithmetic and comparison: float32, float64, and 16 bits one or two at a time.
#include "registers.h"

namespace ptx {
namespace {

template <class T>
void add_comparisons(Table& t, const char* type) {
  auto add = [&](const char* name, auto f) { t[text("setp.%s.%s", name, type)] = compare<T>(f); };
  add("eq", [](T a, T b) { return a == b; });
  add("ne", [](T a, T b) { return a < b || a > b; });
  add("lt", [](T a, T b) { return a < b; });
  add("le", [](T a, T b) { return a <= b; });
  add("gt", [](T a, T b) { return a > b; });
  add("ge", [](T a, T b) { return a >= b; });
  // True also where an operand is NaN
  add("equ", [](T a, T b) { return !(a < b || a > b); });
  add("neu", [](T a, T b) { return a != b; });
  add("ltu", [](T a, T b) { return !(a >= b); });
  add("leu", [](T a, T b) { return !(a > b); });
  add("gtu", [](T a, T b) { return !(a <= b); });
  add("geu", [](T a, T b) { return !(a < b); });
  add("num", [](T a, T b) { return a == a && b == b; });
  add("nan", [](T a, T b) { return a != a || b != b; });
}

template <class H, class F>
bool on_wide(F f, u16 a, u16 b) {
  return f(H::wide(a), H::wide(b));
}

// Operands 0 and 1 = f of the low and the high halves of operands 2 and 3.
template <class H, class F>
Operation compare_pairs(F) {
  return [](Warp& w, const Instruction& i) {
    check_not_in_flight(w, i);
    const u32 *a = w.lanes<u32>(i.op[2]), *b = w.lanes<u32>(i.op[3]);
    u32 low = 0, high = 0, defined = w.defined[i.op[2]] & w.defined[i.op[3]];
    for (int l = 0; l < 32; l++) {
      low |= u32(on_wide<H>(F{}, u16(a[l]), u16(b[l]))) << l;
      high |= u32(on_wide<H>(F{}, u16(a[l] >> 16), u16(b[l] >> 16))) << l;
    }
    set_predicate(w, i.op[0], low), set_defined(w, i.op[0], defined);
    set_predicate(w, i.op[1], high), set_defined(w, i.op[1], defined);
  };
}

template <class H>
void add_half_comparisons(Table& t, const char* type) {
  auto add = [&](const char* name, auto f) {
    t[text("setp.%s.%s", name, type)] =
        compare<u16>([](u16 a, u16 b) { return on_wide<H>(decltype(f){}, a, b); });
    t[text("setp.%s.%sx2", name, type)] = compare_pairs<H>(f);
  };
  add("eq", [](f32 a, f32 b) { return a == b; });
  add("ne", [](f32 a, f32 b) { return a < b || a > b; });
  add("lt", [](f32 a, f32 b) { return a < b; });
  add("le", [](f32 a, f32 b) { return a <= b; });
  add("gt", [](f32 a, f32 b) { return a > b; });
  add("ge", [](f32 a, f32 b) { return a >= b; });
  add("neu", [](f32 a, f32 b) { return a != b; });
  add("nan", [](f32 a, f32 b) { return a != a || b != b; });
}

// A float32 has more than twice a half's bits and two, so rounding its sum or product once more
// rounds correctly; a fused product goes through float64.
template <class H>
void add_halves(Table& t, const std::string& type) {
  auto add = [&](const char* name, auto f) {
    t[name + ("." + type)] = each_lane(f);
    using F = decltype(f);
    if constexpr (std::is_invocable_v<F, u16>) {
      t[name + ("." + type + "x2")] =
          each_lane([](u32 a) { return u32(F{}(u16(a))) | u32(F{}(u16(a >> 16))) << 16; });
    } else if constexpr (std::is_invocable_v<F, u16, u16>) {
      t[name + ("." + type + "x2")] = each_lane([](u32 a, u32 b) {
        return u32(F{}(u16(a), u16(b))) | u32(F{}(u16(a >> 16), u16(b >> 16))) << 16;
      });
    } else {
      t[name + ("." + type + "x2")] = each_lane([](u32 a, u32 b, u32 c) {
        u16 low = F{}(u16(a), u16(b), u16(c));
        return u32(low) | u32(F{}(u16(a >> 16), u16(b >> 16), u16(c >> 16))) << 16;
      });
    }
  };
  add("add", [](u16 a, u16 b) { return H::narrow(H::wide(a) + H::wide(b)); });
  add("sub", [](u16 a, u16 b) { return H::narrow(H::wide(a) - H::wide(b)); });
  add("mul", [](u16 a, u16 b) { return H::narrow(H::wide(a) * H::wide(b)); });
  add("fma", [](u16 a, u16 b, u16 c) {
    return H::narrow(round_to_odd(f64(H::wide(a)) * H::wide(b) + H::wide(c)));
  });
  add("min", [](u16 a, u16 b) { return H::narrow(minimum(H::wide(a), H::wide(b))); });
  add("max", [](u16 a, u16 b) { return H::narrow(maximum(H::wide(a), H::wide(b))); });
  add("min.xorsign.abs", [](u16 a, u16 b) {
    return u16(H::narrow(minimum(H::wide(a & 0x7fff), H::wide(b & 0x7fff))) | ((a ^ b) & 0x8000));
  });
  add("max.xorsign.abs", [](u16 a, u16 b) {
    return u16(H::narrow(maximum(H::wide(a & 0x7fff), H::wide(b & 0x7fff))) | ((a ^ b) & 0x8000));
  });
  add("neg", [](u16 a) { return u16(a ^ 0x8000); });
  add("abs", [](u16 a) { return u16(a & 0x7fff); });
  add_half_comparisons<H>(t, type.c_str());
}

// f, and as name.ftz with subnormal operands and results flushed to 0.
template <class F>
void add_f32(Table& t, const std::string& name, F f) {
  t[name + ".f32"] = each_lane(f);
  if constexpr (std::is_invocable_v<F, f32>) {
    t[name + ".ftz.f32"] = each_lane([](f32 a) { return flush(F{}(flush(a))); });
  } else if constexpr (std::is_invocable_v<F, f32, f32>) {
    t[name + ".ftz.f32"] = each_lane([](f32 a, f32 b) { return flush(F{}(flush(a), flush(b))); });
  } else {
    t[name + ".ftz.f32"] =
        each_lane([](f32 a, f32 b, f32 c) { return flush(F{}(flush(a), flush(b), flush(c))); });
  }
}

template <class T>
T quiet_nan() {
  return std::numeric_limits<T>::quiet_NaN();
}

}  // namespace

void add_floats(Table& t) {
  add_f32(t, "add", [](f32 a, f32 b) { return a + b; });
  add_f32(t, "sub", [](f32 a, f32 b) { return a - b; });
  add_f32(t, "mul", [](f32 a, f32 b) { return a * b; });
  add_f32(t, "fma", [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
  add_f32(t, "neg", [](f32 a) { return -a; });
  add_f32(t, "abs", [](f32 a) { return std::fabs(a); });
  add_f32(t, "min", [](f32 a, f32 b) { return minimum(a, b); });
  add_f32(t, "max", [](f32 a, f32 b) { return maximum(a, b); });
  add_f32(t, "min.NaN",
          [](f32 a, f32 b) { return a != a || b != b ? quiet_nan<f32>() : minimum(a, b); });
  add_f32(t, "max.NaN",
          [](f32 a, f32 b) { return a != a || b != b ? quiet_nan<f32>() : maximum(a, b); });
  // The sign is the product's, the size the smaller or larger one.
  add_f32(t, "min.xorsign.abs", [](f32 a, f32 b) {
    return std::copysign(minimum(std::fabs(a), std::fabs(b)),
                         std::signbit(a) == std::signbit(b) ? 1.f : -1.f);
  });
  add_f32(t, "max.xorsign.abs", [](f32 a, f32 b) {
    return std::copysign(maximum(std::fabs(a), std::fabs(b)),
                         std::signbit(a) == std::signbit(b) ? 1.f : -1.f);
  });
  add_f32(t, "div.rn", [](f32 a, f32 b) { return a / b; });
  add_f32(t, "div.approx", [](f32 a, f32 b) { return divide_approx(a, b); });
  add_f32(t, "div.full", [](f32 a, f32 b) { return divide_full(a, b); });
  add_f32(t, "rcp.rn", [](f32 a) { return 1 / a; });
  add_f32(t, "rcp.approx", [](f32 a) { return reciprocal_approx(a); });
  add_f32(t, "sqrt.rn", [](f32 a) { return std::sqrt(a); });
  add_f32(t, "sqrt.approx", [](f32 a) { return sqrt_approx(a); });
  add_f32(t, "rsqrt.approx", [](f32 a) { return rsqrt_approx(a); });
  add_f32(t, "ex2.approx", [](f32 a) { return exp2_approx(a); });
  add_f32(t, "lg2.approx", [](f32 a) { return log2_approx(a); });
  add_f32(t, "tanh.approx", [](f32 a) { return tanh_approx(a); });
  t["copysign.f32"] = each_lane([](f32 sign, f32 a) { return std::copysign(a, sign); });
  add_comparisons<f32>(t, "f32");

  t["add.f64"] = each_lane([](f64 a, f64 b) { return a + b; });
  t["sub.f64"] = each_lane([](f64 a, f64 b) { return a - b; });
  t["mul.f64"] = each_lane([](f64 a, f64 b) { return a * b; });
  t["fma.f64"] = each_lane([](f64 a, f64 b, f64 c) { return std::fma(a, b, c); });
  t["neg.f64"] = each_lane([](f64 a) { return -a; });
  t["abs.f64"] = each_lane([](f64 a) { return std::fabs(a); });
  t["min.f64"] = each_lane([](f64 a, f64 b) { return minimum(a, b); });
  t["max.f64"] = each_lane([](f64 a, f64 b) { return maximum(a, b); });
  t["div.rn.f64"] = each_lane([](f64 a, f64 b) { return a / b; });
  t["sqrt.rn.f64"] = each_lane([](f64 a) { return std::sqrt(a); });
  // The manual gives no bound; the compiler's library counts it as exact to the last place.
  t["rsqrt.approx.f64"] = each_lane([](f64 a) { return 1 / std::sqrt(a); });
  t["rcp.approx.ftz.f64"] = each_lane([](f64 a) { return reciprocal_approx(a); });
  add_comparisons<f64>(t, "f64");

  add_halves<Half>(t, "f16");
  add_halves<Bfloat>(t, "bf16");
}

}  // namespace ptx
