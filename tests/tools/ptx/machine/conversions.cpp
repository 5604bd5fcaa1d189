// cvt: between integers, floats and packed floats of 16 and 8 bits.
#include "registers.h"

namespace ptx {
namespace {

template <class T>
T clamp_to(f64 whole) {  // a float beyond the integers becomes the last one
  if (whole != whole) return 0;
  constexpr f64 LOW = f64(std::numeric_limits<T>::min()), HIGH = f64(std::numeric_limits<T>::max());
  if (whole <= LOW) return std::numeric_limits<T>::min();
  return whole >= HIGH ? std::numeric_limits<T>::max() : T(whole);
}

template <class D>
void add_integer(Table& t, const std::string& d) {
  t["cvt." + d + ".u8"] = each_lane([](u8 a) { return D(a); });
  t["cvt." + d + ".s8"] = each_lane([](s8 a) { return D(a); });
  t["cvt." + d + ".u16"] = each_lane([](u16 a) { return D(a); });
  t["cvt." + d + ".s16"] = each_lane([](s16 a) { return D(a); });
  t["cvt." + d + ".u32"] = each_lane([](u32 a) { return D(a); });
  t["cvt." + d + ".s32"] = each_lane([](s32 a) { return D(a); });
  t["cvt." + d + ".u64"] = each_lane([](u64 a) { return D(a); });
  t["cvt." + d + ".s64"] = each_lane([](s64 a) { return D(a); });
  t["cvt.rn.f32." + d] = each_lane([](D a) { return f32(a); });
  t["cvt.rn.f64." + d] = each_lane([](D a) { return f64(a); });
  t["cvt.rzi." + d + ".f32"] = each_lane([](f32 a) { return clamp_to<D>(std::trunc(f64(a))); });
  t["cvt.rni." + d + ".f32"] = each_lane([](f32 a) { return clamp_to<D>(std::nearbyint(f64(a))); });
  t["cvt.rzi." + d + ".f16"] =
      each_lane([](u16 a) { return clamp_to<D>(std::trunc(f64(Half::wide(a)))); });
  t["cvt.rzi." + d + ".bf16"] =
      each_lane([](u16 a) { return clamp_to<D>(std::trunc(f64(Bfloat::wide(a)))); });
  t["cvt.rzi." + d + ".f64"] = each_lane([](f64 a) { return clamp_to<D>(std::trunc(a)); });
}

u16 truncate_to_half(f32 f) {
  u16 rounded = float_to_half(f);
  return std::fabs(half_to_float(rounded)) > std::fabs(f) ? rounded - 1 : rounded;
}

template <class H>
void add_half(Table& t, const std::string& type) {
  t["cvt.f32." + type] = each_lane([](u16 a) { return H::wide(a); });
  t["cvt.f64." + type] = each_lane([](u16 a) { return f64(H::wide(a)); });
  t["cvt.rn." + type + ".f32"] = each_lane([](f32 a) { return H::narrow(a); });
  t["cvt.rn." + type + ".f64"] = each_lane([](f64 a) { return H::narrow(round_to_odd(a)); });
  t["cvt.rn." + type + "x2.f32"] =
      each_lane([](f32 high, f32 low) { return u32(H::narrow(high)) << 16 | H::narrow(low); });
}

}  // namespace

void add_conversions(Table& t) {
  add_integer<u8>(t, "u8"), add_integer<s8>(t, "s8");
  add_integer<u16>(t, "u16"), add_integer<s16>(t, "s16");
  add_integer<u32>(t, "u32"), add_integer<s32>(t, "s32");
  add_integer<u64>(t, "u64"), add_integer<s64>(t, "s64");
  add_half<Half>(t, "f16");
  add_half<Bfloat>(t, "bf16");
  t["cvt.rn.f16.bf16"] = each_lane([](u16 a) { return Half::narrow(Bfloat::wide(a)); });
  t["cvt.rn.bf16.f16"] = each_lane([](u16 a) { return Bfloat::narrow(Half::wide(a)); });
  t["cvt.rz.f16.f32"] = each_lane([](f32 a) { return truncate_to_half(a); });
  t["cvt.f64.f32"] = each_lane([](f32 a) { return f64(a); });
  t["cvt.rn.f32.f64"] = each_lane([](f64 a) { return f32(a); });
  t["cvt.rni.f32.f32"] = each_lane([](f32 a) { return std::nearbyintf(a); });
  t["cvt.rzi.f32.f32"] = each_lane([](f32 a) { return std::trunc(a); });
  t["cvt.rmi.f32.f32"] = each_lane([](f32 a) { return std::floor(a); });
  t["cvt.rpi.f32.f32"] = each_lane([](f32 a) { return std::ceil(a); });
  t["cvt.rna.tf32.f32"] = each_lane([](u32 a) {  // to nearest, halves away from 0
    bool finite = (a & 0x7f800000) != 0x7f800000;
    return finite ? (a + 0x1000) & ~0x1fffu : a;
  });
  t["cvt.rn.satfinite.e4m3x2.f32"] = each_lane(
      [](f32 high, f32 low) { return u16(float_to_e4m3(high) << 8 | float_to_e4m3(low)); });
  t["cvt.rn.satfinite.e5m2x2.f32"] = each_lane(
      [](f32 high, f32 low) { return u16(float_to_e5m2(high) << 8 | float_to_e5m2(low)); });
  t["cvt.rn.satfinite.e4m3x2.f16x2"] = each_lane([](u32 a) {
    return u16(float_to_e4m3(half_to_float(a >> 16)) << 8 | float_to_e4m3(half_to_float(u16(a))));
  });
  t["cvt.rn.satfinite.e5m2x2.f16x2"] = each_lane([](u32 a) {
    return u16(float_to_e5m2(half_to_float(a >> 16)) << 8 | float_to_e5m2(half_to_float(u16(a))));
  });
  t["cvt.rn.f16x2.e4m3x2"] = each_lane([](u16 a) {
    u32 high = float_to_half(e4m3_to_float(a >> 8));
    return high << 16 | float_to_half(e4m3_to_float(u8(a)));
  });
  t["cvt.rn.f16x2.e5m2x2"] = each_lane([](u16 a) { return u32(a >> 8) << 24 | u32(u8(a)) << 8; });
}

}  // namespace ptx
