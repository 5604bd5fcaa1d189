// How operations read and write registers, and what is checked when they do.
#pragma once
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace ptx {

template <class T>
T get(const u32* words, int lane) {
  if constexpr (sizeof(T) == 8) return bit_cast<T>(reinterpret_cast<const u64*>(words)[lane]);
  else if constexpr (sizeof(T) == 4) return bit_cast<T>(words[lane]);
  else if constexpr (sizeof(T) == 2) return bit_cast<T>(u16(words[lane]));
  else return bit_cast<T>(u8(words[lane]));
}

template <class T>
void put(u32* words, int lane, T value) {
  if constexpr (sizeof(T) == 8) reinterpret_cast<u64*>(words)[lane] = bit_cast<u64>(value);
  else if constexpr (sizeof(T) == 4) words[lane] = bit_cast<u32>(value);
  else if constexpr (sizeof(T) == 2) words[lane] = bit_cast<u16>(value);
  else words[lane] = u32(s32(value));  // 8 bits live in a wider register, extended
}

// A register's value as an address or number, whatever its width.
inline u64 number(Warp& w, int r, int lane) {
  return w.machine->classes[r] == DOUBLE ? w.lanes<u64>(r)[lane] : w.lanes<u32>(r)[lane];
}

inline void set_number(Warp& w, int r, int lane, u64 value) {
  if (w.machine->classes[r] == DOUBLE) w.lanes<u64>(r)[lane] = value;
  else w.lanes<u32>(r)[lane] = u32(value);
}

inline void set_predicate(Warp& w, int r, u32 bits) {
  u32& word = w.words[w.machine->offsets[r]];
  word = (word & ~w.active) | (bits & w.active);
}

// Where an undefined value would decide something: an address, a guard, what memory holds.
inline void require_defined(Warp& w, int r, const char* what) {
  u32 undefined = w.active & ~w.defined[r];
  if (undefined) report(w, "uninitialised", text("%s is undefined in lanes %08x", what, undefined));
}

inline void check_not_in_flight(Warp& w, const Instruction& i, int first, int last) {
  if (w.n_wgmma_registers == 0) return;
  for (int k = first; k < last; k++)
    if (w.wgmma_results[i.op[k]])
      report(w, "wgmma-result", text("operand %d is the result of a wgmma under way", k));
}
inline void check_not_in_flight(Warp& w, const Instruction& i) {
  check_not_in_flight(w, i, 0, i.count);
}

// An instruction of a warp: the lanes of its member mask execute it together. One that has returned
// no longer counts.
inline void require_members(Warp& w, int mask, const char* what) {
  require_defined(w, mask, "a member mask");
  for (int l = 0; l < 32; l++)
    if (w.runs(l) && (w.lanes<u32>(mask)[l] & w.live) != w.active) {
      report(w, "divergence",
             text("%s with lanes %08x of %08x", what, w.active, w.lanes<u32>(mask)[l]));
      return;
    }
}

// After a write of the active lanes: which of them hold a value now.
inline void set_defined(Warp& w, int r, u32 lanes) {
  if (w.n_wgmma_registers && w.wgmma_operands[r])
    report(w, "wgmma-a-overwrite", "writes a register that a wgmma under way reads as operand A");
  w.written_epoch[r] = w.fence_epoch;
  w.defined[r] = (w.defined[r] & ~w.active) | (lanes & w.active);
}

// ------------------------------------------------------------- operations on one lane at a time

template <class F>
struct Signature : Signature<decltype(&F::operator())> {};
template <class F, class R, class... A>
struct Signature<R (F::*)(A...) const> {
  using Result = R;
  using Arguments = std::tuple<A...>;
};

template <class F, class R, class... A, std::size_t... K>
void apply_lanes(Warp& w, const Instruction& i, std::tuple<A...>*, std::index_sequence<K...>) {
  check_not_in_flight(w, i, 0, 1 + sizeof...(A));
  u32* out = w.lanes<u32>(i.op[0]);
  const u32* in[] = {w.lanes<u32>(i.op[K + 1])...};
  u32 defined = (w.defined[i.op[K + 1]] & ...);
  if (w.active == ALL_LANES) {
#pragma GCC ivdep
    for (int l = 0; l < 32; l++) put<R>(out, l, F{}(get<A>(in[K], l)...));
  } else {
    for (int l = 0; l < 32; l++)
      if (w.runs(l)) put<R>(out, l, F{}(get<A>(in[K], l)...));
  }
  set_defined(w, i.op[0], defined);
}

// The operation that writes f(operands 1, 2, ...) of each lane to operand 0.
template <class F>
Operation each_lane(F) {
  return [](Warp& w, const Instruction& i) {
    using S = Signature<F>;
    using Arguments = typename S::Arguments;
    apply_lanes<F, typename S::Result>(w, i, static_cast<Arguments*>(nullptr),
                                       std::make_index_sequence<std::tuple_size_v<Arguments>>{});
  };
}

// Operand 0 = f(operand 1, operand 2), f of a lane's values → bool.
template <class T, class F>
Operation compare(F) {
  return [](Warp& w, const Instruction& i) {
    check_not_in_flight(w, i);
    const u32 *a = w.lanes<u32>(i.op[1]), *b = w.lanes<u32>(i.op[2]);
    u32 bits = 0;
    for (int l = 0; l < 32; l++) bits |= u32(F{}(get<T>(a, l), get<T>(b, l))) << l;
    set_predicate(w, i.op[0], bits);
    set_defined(w, i.op[0], w.defined[i.op[1]] & w.defined[i.op[2]]);
  };
}

}  // namespace ptx
