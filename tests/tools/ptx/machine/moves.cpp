// Moves, selections, predicates, special registers, and what lanes of a warp tell each other.
#include "registers.h"

namespace ptx {
namespace {

template <class T>
void add_move(Table& t, const std::string& type) {
  // A copy is where its source was written for wgmma.fence: ptxas allocates registers itself and
  // has every copy of an accumulator before the fence (WARPGROUP.ARRIVE), wherever PTX has it.
  // A constant (0: never written) is no copy: its move is the write.
  t["mov." + type] = [](Warp& w, const Instruction& i) {
    u32 written = w.written_epoch[i.op[1]];
    each_lane([](T a) { return a; })(w, i);
    if (written) w.written_epoch[i.op[0]] = written;
  };
  // Operand 0 = operand 3 ? operand 1 : operand 2
  t["selp." + type] = [](Warp& w, const Instruction& i) {
    check_not_in_flight(w, i);
    u32 *out = w.lanes<u32>(i.op[0]), chosen = w.predicate(i.op[3]);
    const u32 *a = w.lanes<u32>(i.op[1]), *b = w.lanes<u32>(i.op[2]);
    for (int l = 0; l < 32; l++)
      if (w.runs(l)) put<T>(out, l, chosen >> l & 1 ? get<T>(a, l) : get<T>(b, l));
    u32 defined = (w.defined[i.op[1]] & chosen) | (w.defined[i.op[2]] & ~chosen);
    set_defined(w, i.op[0], defined & w.defined[i.op[3]]);
  };
}

template <class F>
Operation on_predicates(F) {
  return [](Warp& w, const Instruction& i) {
    u32 a = w.predicate(i.op[1]), b = i.count > 2 ? w.predicate(i.op[2]) : 0;
    u32 defined = w.defined[i.op[1]] & (i.count > 2 ? w.defined[i.op[2]] : ALL_LANES);
    set_predicate(w, i.op[0], F{}(a, b));
    set_defined(w, i.op[0], defined);
  };
}

// imm[0]: bytes of a part; the first part is the lowest.
void pack(Warp& w, const Instruction& i) {
  check_not_in_flight(w, i);
  int bits = 8 * i.imm[0];
  u32 defined = ALL_LANES;
  for (int k = 1; k < i.count; k++) defined &= w.defined[i.op[k]];
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l)) continue;
    u64 value = 0;
    for (int k = 1; k < i.count; k++) {
      u64 part = w.lanes<u32>(i.op[k])[l] & (u64(-1) >> (64 - bits));
      value |= part << bits * (k - 1);
    }
    set_number(w, i.op[0], l, value);
  }
  set_defined(w, i.op[0], defined);
}

void unpack(Warp& w, const Instruction& i) {
  check_not_in_flight(w, i);
  int bits = 8 * i.imm[0], n = i.count - 1;
  u64 values[32];
  for (int l = 0; l < 32; l++) values[l] = number(w, i.op[n], l);
  u32 defined = w.defined[i.op[n]];
  for (int k = 0; k < n; k++) {
    u32* out = w.lanes<u32>(i.op[k]);
    for (int l = 0; l < 32; l++)
      if (w.runs(l)) out[l] = u32(values[l] >> bits * k) & u32(u64(-1) >> (64 - bits));
    set_defined(w, i.op[k], defined);
  }
}

// imm[0]: which; the order is that of SPECIAL_REGISTERS in instructions.py.
void special_register(Warp& w, const Instruction& i) {
  const Machine& m = *w.machine;
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l)) continue;
    u32 values[] = {u32(w.id * 32 + l),
                    0,
                    0,
                    w.cta->id[0],
                    w.cta->id[1],
                    w.cta->id[2],
                    u32(m.n_warps * 32),
                    1,
                    1,
                    m.grid[0],
                    m.grid[1],
                    m.grid[2],
                    u32(l),
                    u32(w.id),
                    0};
    set_number(w, i.op[0], l, values[i.imm[0]]);
  }
  set_defined(w, i.op[0], ALL_LANES);
}

// Operand 0 = the address of the parameter whose offset is operand 1.
void parameter_address(Warp& w, const Instruction& i) {
  u64 start = reinterpret_cast<u64>(w.machine->parameters.data());
  for (int l = 0; l < 32; l++)
    if (w.runs(l)) w.lanes<u64>(i.op[0])[l] = start + w.lanes<u64>(i.op[1])[l];
  set_defined(w, i.op[0], w.defined[i.op[1]]);
}

// Operands: result, the predicate if imm[1], value, which lane, bounds, mask. imm[0]: 0 idx, 1
// bfly, 2 up, 3 down.
void shuffle(Warp& w, const Instruction& i) {
  check_not_in_flight(w, i);
  const s32* in = i.op + 1 + i.imm[1];
  const u32 *value = w.lanes<u32>(in[0]), *which = w.lanes<u32>(in[1]);
  const u32* bounds = w.lanes<u32>(in[2]);
  require_members(w, in[3], "shfl.sync");
  u32 values[32], inside = 0, defined = 0;
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l)) continue;
    int segment = bounds[l] >> 8 & 31, clamp = bounds[l] & 31, b = which[l] & 31;
    int last = (l & segment) | (clamp & ~segment), from;
    bool in_range;
    switch (i.imm[0]) {
      case 0: from = (l & segment) | (b & ~segment), in_range = from <= last; break;
      case 1: from = l ^ b, in_range = from <= last; break;
      case 2: from = l - b, in_range = from >= last; break;
      default: from = l + b, in_range = from <= last;
    }
    if (!in_range) from = l;
    if (!w.runs(from)) report(w, "divergence", "shfl.sync reads a lane that does not take part");
    values[l] = value[from];
    inside |= u32(in_range) << l;
    defined |= (w.defined[in[0]] >> from & 1) << l;
  }
  for (int l = 0; l < 32; l++)
    if (w.runs(l)) w.lanes<u32>(i.op[0])[l] = values[l];
  set_defined(w, i.op[0], defined);
  if (i.imm[1]) set_predicate(w, i.op[1], inside), set_defined(w, i.op[1], ALL_LANES);
}

void vote(Warp& w, const Instruction& i, u32 bits) {
  require_defined(w, i.op[1], "a vote");
  require_members(w, i.op[2], "vote.sync");
  if (w.machine->classes[i.op[0]] == PREDICATE) set_predicate(w, i.op[0], bits);
  else
    for (int l = 0; l < 32; l++)
      if (w.runs(l)) w.lanes<u32>(i.op[0])[l] = bits;
  set_defined(w, i.op[0], ALL_LANES);
}

// Operand 0 = operand 1 of the lanes, combined
template <class T, class F>
Operation reduce_lanes(F) {
  return [](Warp& w, const Instruction& i) {
    require_defined(w, i.op[1], "what is reduced");
    require_members(w, i.op[2], "redux.sync");
    const T* values = w.lanes<T>(i.op[1]);
    T result = values[std::countr_zero(w.active)];
    for (int l = std::countr_zero(w.active) + 1; l < 32; l++)
      if (w.runs(l)) result = F{}(result, values[l]);
    for (int l = 0; l < 32; l++)
      if (w.runs(l)) w.lanes<T>(i.op[0])[l] = result;
    set_defined(w, i.op[0], ALL_LANES);
  };
}

// Operands: the elected lane's number, whether it is this lane
void elect(Warp& w, const Instruction& i) {
  require_members(w, i.op[2], "elect.sync");
  u32 first = std::countr_zero(w.active);
  for (int l = 0; l < 32; l++)
    if (w.runs(l)) w.lanes<u32>(i.op[0])[l] = first;
  set_defined(w, i.op[0], ALL_LANES);
  set_predicate(w, i.op[1], 1u << first);
  set_defined(w, i.op[1], ALL_LANES);
}

}  // namespace

void add_moves(Table& t) {
  add_move<u16>(t, "b16"), add_move<u32>(t, "b32"), add_move<u64>(t, "b64");
  t["mov.pred"] = on_predicates([](u32 a, u32) { return a; });
  t["not.pred"] = on_predicates([](u32 a, u32) { return ~a; });
  t["and.pred"] = on_predicates([](u32 a, u32 b) { return a & b; });
  t["or.pred"] = on_predicates([](u32 a, u32 b) { return a | b; });
  t["xor.pred"] = on_predicates([](u32 a, u32 b) { return a ^ b; });
  t["pack"] = pack;
  t["unpack"] = unpack;
  t["special_register"] = special_register;
  t["parameter_address"] = parameter_address;
  t["nop"] = [](Warp&, const Instruction&) {};
  t["ret"] = [](Warp& w, const Instruction&) { w.live &= ~w.active; };
  t["trap"] = [](Warp& w, const Instruction&) {
    report(w, "trap", "the kernel stopped itself");
    w.machine->stopped = true;
  };
}

void add_lane_exchange(Table& t) {
  t["shfl"] = shuffle;
  t["elect"] = elect;
  t["redux.add.s32"] = reduce_lanes<s32>([](s32 a, s32 b) { return s32(u32(a) + u32(b)); });
  t["redux.min.s32"] = reduce_lanes<s32>([](s32 a, s32 b) { return std::min(a, b); });
  t["redux.max.s32"] = reduce_lanes<s32>([](s32 a, s32 b) { return std::max(a, b); });
  t["redux.min.u32"] = reduce_lanes<u32>([](u32 a, u32 b) { return std::min(a, b); });
  t["redux.max.u32"] = reduce_lanes<u32>([](u32 a, u32 b) { return std::max(a, b); });
  t["redux.or.b32"] = reduce_lanes<u32>([](u32 a, u32 b) { return a | b; });
  t["vote.any"] = [](Warp& w, const Instruction& i) {
    vote(w, i, w.predicate(i.op[1]) & w.active ? ALL_LANES : 0);
  };
  t["vote.all"] = [](Warp& w, const Instruction& i) {
    vote(w, i, (w.predicate(i.op[1]) & w.active) == w.active ? ALL_LANES : 0);
  };
  t["vote.ballot"] = [](Warp& w, const Instruction& i) {
    vote(w, i, w.predicate(i.op[1]) & w.active);
  };
}

}  // namespace ptx
