// Barriers of warps, of a CTA and in shared memory, and the fence between proxies.
#include "memory.h"

namespace ptx {

Mbarrier* find_mbarrier(Warp& w, u64 address) {
  auto found = w.cta->mbarriers.find(u32(address));
  if (found == w.cta->mbarriers.end() || !found->second.valid) {
    report(w, "mbarrier", text("there is none at 0x%llx", (unsigned long long)address));
    w.machine->stopped = true;
    return nullptr;
  }
  read_shared(w, u32(address), 8, NO_LANE);
  return &found->second;
}

void advance(Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.phase ^= 1, b.pending = b.count;
  b.released = b.clock;
  b.clock[b.agent]++;
}

namespace {

// ------------------------------------------------------------------------------- CTA and warp

void release(Cta& cta, CtaBarrier& b) {
  Clock clock{}, fenced{};
  for (int k : b.warps) join(clock, cta.warps[k]->clock), join(fenced, cta.warps[k]->fenced);
  for (int k : b.warps) {
    Warp& w = *cta.warps[k];
    w.clock = clock, w.fenced = fenced;
    w.clock[k]++, w.epoch++;
    if (w.state == State::AT_BARRIER) w.state = State::RUNNING;
  }
  b = CtaBarrier();
}

// Operands, both optional: the barrier's number, the threads it waits for.
void bar_sync(Warp& w, const Instruction& i) {
  if (w.active != w.live)
    report(w, "divergence", text("bar.sync with lanes %08x of %08x", w.active, w.live));
  int lane = std::countr_zero(w.active);
  u32 id = i.count > 0 ? u32(number(w, i.op[0], lane)) : 0;
  u32 threads = i.count > 1 ? u32(number(w, i.op[1], lane)) : w.machine->n_warps * 32;
  CtaBarrier& b = w.cta->barriers[id];
  if (threads % 32) report(w, "barrier", text("%u threads, no multiple of 32", threads));
  if (b.expected && b.expected != threads)
    report(w, "barrier", "warps disagree about the threads it waits for");
  b.expected = threads, b.arrived += 32;
  b.warps.push_back(w.id);
  w.state = State::AT_BARRIER;
  if (b.arrived >= threads) release(*w.cta, b);
}

void bar_warp_sync(Warp& w, const Instruction& i) {
  require_members(w, i.op[0], "bar.warp.sync");
  w.epoch++;
}

// ---------------------------------------------------------------------------------- mbarriers
// Operand 0 is the address, imm[0] its offset, unless said otherwise.

u64 first_address(Warp& w, const Instruction& i, int operand) {
  require_defined(w, i.op[operand], "an address");
  return number(w, i.op[operand], std::countr_zero(w.active)) + i.imm[0];
}

void write_mbarrier(Warp& w, u64 address, u8 mark) {
  u8 data[8] = {mark};
  write_shared(w, address, data, 8, std::countr_zero(w.active), true);
}

// Operand 1: arrivals a phase
void init(Warp& w, const Instruction& i) {
  u64 address = first_address(w, i, 0);
  if (!in_shared(w, address, 8) || address % 8) {
    report(w, "mbarrier", text("at 0x%llx", (unsigned long long)address));
    return;
  }
  auto [place, is_new] = w.cta->mbarriers.try_emplace(u32(address));
  Mbarrier& b = place->second;
  if (b.valid) report(w, "mbarrier", "initialised while it is valid");
  int agent = is_new ? w.machine->n_warps + w.cta->n_mbarrier_agents++ : b.agent;
  if (agent >= MAX_AGENTS) {
    report(w, "mbarrier",
           text("more of them than the machine follows, %d", MAX_AGENTS - w.machine->n_warps));
    w.machine->stopped = true;
    return;
  }
  u32 time = is_new ? 1 : b.clock[agent] + 1;
  b = Mbarrier();
  b.valid = true, b.agent = agent, b.clock = w.clock, b.clock[agent] = time;
  b.count = b.pending = w.lanes<u32>(i.op[1])[std::countr_zero(w.active)];
  write_mbarrier(w, address, 1);
}

void invalidate(Warp& w, const Instruction& i) {
  u64 address = first_address(w, i, 0);
  Mbarrier* b = find_mbarrier(w, address);
  if (!b) return;
  if (b->pending != b->count || b->bytes) report(w, "mbarrier", "made invalid within a phase");
  b->valid = false;
  write_mbarrier(w, address, 2);
}

// Operand 1, if imm[1]: bytes that the phase waits for. Each active lane arrives.
void arrive(Warp& w, const Instruction& i) {
  require_defined(w, i.op[0], "an address");
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l)) continue;
    Mbarrier* b = find_mbarrier(w, number(w, i.op[0], l) + i.imm[0]);
    if (!b) return;
    if (i.imm[1]) b->bytes += w.lanes<u32>(i.op[1])[l];
    join(b->clock, w.clock);
    if (b->pending == 0) report(w, "mbarrier", "more arrivals than it expects");
    else b->pending--;
    advance(*b);
  }
  w.clock[w.id]++;
}

// Operands: whether the phase of this parity is over, address, parity. A warp that must try again
// rests until the phase changes.
void try_wait(Warp& w, const Instruction& i) {
  u64 address = first_address(w, i, 1);
  require_defined(w, i.op[2], "a parity");
  Mbarrier* b = find_mbarrier(w, address);
  if (!b) return;
  u32 parity = w.lanes<u32>(i.op[2])[std::countr_zero(w.active)] & 1;
  bool over = b->phase != parity;
  set_predicate(w, i.op[0], over ? ALL_LANES : 0);
  set_defined(w, i.op[0], ALL_LANES);
  if (over) join(w.clock, b->released);
  else w.state = State::AT_MBARRIER, w.waits_at = u32(address), w.waits_phase = parity;
}

}  // namespace

void add_barriers(Table& t) {
  t["bar.sync"] = bar_sync;
  t["bar.warp.sync"] = bar_warp_sync;
  t["fence.proxy.async"] = [](Warp& w, const Instruction&) { join(w.fenced, w.clock); };
  t["mbarrier.init"] = init;
  t["mbarrier.inval"] = invalidate;
  t["mbarrier.arrive"] = arrive;
  t["mbarrier.try_wait"] = try_wait;
}

}  // namespace ptx
