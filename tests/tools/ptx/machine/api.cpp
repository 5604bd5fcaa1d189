// What Python calls; the counterpart of machine.py.
#include <cstring>

#include "machine.h"

using namespace ptx;

// One instruction as Python writes it
struct Row {
  s64 operation, first_operand, count, guard, negated, target, imm[4];
};
struct Register {
  u64 kind, is_constant, value;
};

static void lay_out(Machine& m, const Register* registers, s64 n_registers) {
  u32 at = 0;
  for (s64 r = 0; r < n_registers; r++) {
    m.classes.push_back(RegisterClass(registers[r].kind));
    at += registers[r].kind == DOUBLE ? at & 1 : 0;
    m.offsets.push_back(at);
    at += registers[r].kind == PREDICATE ? 1 : registers[r].kind == WORD ? 32 : 64;
  }
  m.initial_words.assign((at + 15) / 16 * 16, 0xdeadbeef);
  m.initial_defined.assign(n_registers, 0);
  for (s64 r = 0; r < n_registers; r++) {
    if (!registers[r].is_constant) continue;
    m.initial_defined[r] = ALL_LANES;
    u32* words = &m.initial_words[m.offsets[r]];
    u64 value = registers[r].value;
    if (m.classes[r] == PREDICATE) *words = value ? ALL_LANES : 0;
    for (int l = 0; l < 32 && m.classes[r] != PREDICATE; l++) {
      if (m.classes[r] == WORD) words[l] = u32(value);
      else std::memcpy(words + 2 * l, &value, 8);
    }
  }
}

extern "C" {

int ptx_knows(const char* operation) { return table().count(operation); }

Machine* ptx_new(const char* const* names, const Row* rows, s64 n_rows, const s32* operands,
                 s64 n_operands, const Register* registers, s64 n_registers, s64 n_warps,
                 s64 shared_bytes, s64 shared_shift, s64 global_shift) {
  auto* m = new Machine{};
  m->operands.assign(operands, operands + n_operands);
  m->n_warps = n_warps, m->shared_bytes = shared_bytes;
  m->shared_shift = shared_shift, m->global_shift = global_shift;
  lay_out(*m, registers, n_registers);
  for (s64 k = 0; k < n_rows; k++) {
    const Row& row = rows[k];
    Instruction i{table().at(names[row.operation]),
                  m->operands.data() + row.first_operand,
                  s32(row.count),
                  s32(row.guard),
                  row.negated != 0,
                  s32(row.target),
                  {}};
    std::memcpy(i.imm, row.imm, sizeof i.imm);
    m->code.push_back(i);
  }
  return m;
}

void ptx_delete(Machine* m) { delete m; }

// `storages`: address and bytes of each. Returns the number of reports.
s64 ptx_run(Machine* m, const u8* parameters, s64 n_parameters, const u64* storages, s64 n_storages,
            const u32* grid, s64 schedule, s64 instruction_limit, s64 watch_tensors) {
  m->parameters.assign(parameters, parameters + n_parameters);
  m->schedule = schedule, m->instruction_limit = instruction_limit;
  m->executed = 0, m->stopped = false, m->last_storage = nullptr;
  m->reports.clear(), m->storages.clear();
  m->hits.assign(m->code.size(), 0);
  std::memcpy(m->grid, grid, sizeof m->grid);
  for (s64 k = 0; k < n_storages; k++) {
    Storage s{storages[2 * k], storages[2 * k + 1], {}};
    if (watch_tensors) s.cells.resize((s.size >> m->global_shift) + 2);
    m->storages.push_back(std::move(s));
  }
  for (u32 z = 0; z < grid[2]; z++)
    for (u32 y = 0; y < grid[1]; y++)
      for (u32 x = 0; x < grid[0] && !m->stopped; x++) run_cta(*m, x, y, z);
  m->storages.clear();
  return m->reports.size();
}

u64 ptx_executed(const Machine* m) { return m->executed; }
const u64* ptx_hits(const Machine* m) { return m->hits.data(); }

// Report k as "kind\tinstruction\ttimes\tmessage"
void ptx_report(const Machine* m, s64 k, char* out, s64 size) {
  auto at = m->reports.begin();
  std::advance(at, k);
  const auto& [place, found] = *at;
  std::string line =
      place.first + text("\t%d\t%llu\t", place.second, (unsigned long long)found.times);
  std::snprintf(out, size, "%s%s", line.c_str(), found.message.c_str());
}
}
