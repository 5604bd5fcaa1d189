// The scheduler: which lanes of which warp execute what next.
#include <cstdarg>
#include <cstring>
#include <memory>

#include "registers.h"

namespace ptx {

std::string text(const char* format, ...) {
  char buffer[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

void report(Warp& w, const char* kind, const std::string& message) {
  auto [place, is_new] = w.machine->reports.try_emplace({kind, w.pc});
  if (is_new) {
    const u32* id = w.cta->id;
    place->second.message =
        message + text(" [program %u, %u, %u, warp %d]", id[0], id[1], id[2], w.id);
  }
  place->second.times++;
}

const Table& table() {
  static const Table operations = [] {
    Table t;
    add_integers(t), add_floats(t), add_conversions(t), add_moves(t), add_lane_exchange(t);
    add_memory(t), add_tensor_cores(t), add_wgmma(t), add_barriers(t), add_bulk_copies(t);
    return t;
  }();
  return operations;
}

namespace {

// The lanes at the lowest program counter go first, so that they meet where branches join.
void choose_lanes(Warp& w) {
  w.active = w.live;
  if (!w.diverged) return;
  w.pc = std::numeric_limits<int>::max();
  for (int l = 0; l < 32; l++)
    if (w.live >> l & 1) w.pc = std::min(w.pc, w.lane_pc[l]);
  w.active = 0;
  for (int l = 0; l < 32; l++)
    if (w.live >> l & 1 && w.lane_pc[l] == w.pc) w.active |= 1u << l;
}

void advance_lanes(Warp& w, u32 lanes, u32 taken, int target) {
  if (!w.diverged && (taken == 0 || taken == lanes)) {
    w.pc = taken ? target : w.pc + 1;
    return;
  }
  for (int l = 0; l < 32; l++)
    if (lanes >> l & 1) w.lane_pc[l] = taken >> l & 1 ? target : w.pc + 1;
  int first = -1;
  w.diverged = false;
  for (int l = 0; l < 32; l++) {
    if (!(w.live >> l & 1)) continue;
    if (first < 0) first = w.lane_pc[l];
    w.diverged |= w.lane_pc[l] != first;
  }
  if (!w.diverged) w.pc = first;
}

void step(Warp& w) {
  Machine& m = *w.machine;
  choose_lanes(w);
  u32 lanes = w.active;
  if (w.pc >= int(m.code.size())) {
    report(w, "end", "ran past the last instruction");
    m.stopped = true;
    return;
  }
  const Instruction& i = m.code[w.pc];
  m.executed++;
  if (i.guard >= 0) {
    require_defined(w, i.guard, "a guard");
    u32 bits = w.predicate(i.guard);
    w.active &= i.negated ? ~bits : bits;
  }
  u32 taken = i.target >= 0 ? w.active : 0;
  if (w.active) {
    m.hits[w.pc]++;
    i.run(w, i);
  }
  advance_lanes(w, lanes, taken, i.target);
  if (w.live == 0) w.state = State::DONE;
}

void wake(Warp& w) {
  if (w.state == State::AT_MBARRIER && w.cta->mbarriers[w.waits_at].phase != w.waits_phase)
    w.state = State::RUNNING;
}

// Runs the warps in turn until all wait or are done; false when none could go on.
bool run_warps(Cta& cta, u32& random) {
  Machine& m = *cta.machine;
  bool progress = false;
  for (int turn = 0; turn < m.n_warps && !m.stopped; turn++) {
    int k = turn;
    u64 steps = ~u64(0);
    if (m.schedule) k = scramble(random++) % m.n_warps, steps = 1 + scramble(random++) % 97;
    Warp& w = *cta.warps[k];
    wake(w);
    progress |= w.state == State::RUNNING;
    while (w.state == State::RUNNING && steps-- && !m.stopped) {
      step(w);
      if (m.executed - m.program_start >= m.instruction_limit) {
        report(w, "endless",
               text("more than %llu instructions", (unsigned long long)m.instruction_limit));
        m.stopped = true;
      }
    }
  }
  for (Warp* w : cta.warps) wake(*w), progress |= w->state == State::RUNNING;
  return progress;
}

void report_unfinished(Warp& w) {
  if (w.bulk_groups.size() || w.bulk_open.size())
    report(w, "unfinished", "a bulk store was not waited for");
  if (w.wgmma_groups.size() || w.wgmma_open.results.size())
    report(w, "unfinished", "a wgmma was not waited for");
}

}  // namespace

void run_cta(Machine& m, u32 x, u32 y, u32 z) {
  Cta cta{};
  cta.machine = &m;
  m.program_start = m.executed;
  cta.id[0] = x, cta.id[1] = y, cta.id[2] = z;
  cta.number = x + m.grid[0] * (y + m.grid[1] * z);
  cta.shared.assign(m.shared_bytes, 0xff);  // NaN in every float format
  cta.cells.assign((m.shared_bytes >> m.shared_shift) + 1, SharedCell{});
  cta.reads.assign(cta.cells.size() * m.n_warps, 0);

  size_t n_words = m.initial_words.size(), n_registers = m.classes.size();
  std::vector<u32> words, defined;
  for (int k = 0; k < m.n_warps; k++) {
    words.insert(words.end(), m.initial_words.begin(), m.initial_words.end());
    defined.insert(defined.end(), m.initial_defined.begin(), m.initial_defined.end());
  }
  std::vector<std::unique_ptr<Warp>> warps;
  for (int k = 0; k < m.n_warps; k++) {
    Warp& w = *warps.emplace_back(std::make_unique<Warp>());
    w.cta = &cta, w.machine = &m, w.id = k;
    w.words = words.data() + n_words * k, w.defined = defined.data() + n_registers * k;
    w.wgmma_results.assign(n_registers, 0), w.wgmma_operands.assign(n_registers, 0);
    w.written_epoch.assign(n_registers, 0);
    w.clock[k] = 1;
    cta.warps.push_back(&w);
  }

  u32 random = m.schedule + cta.number * 1000003;
  auto all_done = [&] {
    return std::all_of(cta.warps.begin(), cta.warps.end(),
                       [](Warp* w) { return w->state == State::DONE; });
  };
  while (!m.stopped && !all_done()) {
    if (run_warps(cta, random) || complete_bulk_load(cta)) continue;
    for (Warp* w : cta.warps)
      if (w->state != State::DONE) report(*w, "deadlock", "waits for ever");
    m.stopped = true;
  }
  if (m.stopped) return;
  while (complete_bulk_load(cta))
    report(*cta.warps[0], "unfinished", "a bulk load was not waited for");
  for (Warp* w : cta.warps) report_unfinished(*w);
}

}  // namespace ptx
