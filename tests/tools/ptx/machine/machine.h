// The state of a launch: the machine with its program, the running CTA, its warps.
//
// A register holds 32 lanes; a predicate register is one word of bits. Beside each register stands
// which of its lanes were ever given a value. Warps and mbarriers are the agents of vector clocks:
// agent a's event at time t is known to warp w if w.clock[a] >= t.
#pragma once
#include <array>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "numbers.h"

namespace ptx {

constexpr u32 ALL_LANES = ~0u;
constexpr int MAX_AGENTS = 96;
constexpr u32 FIRST_FENCE_EPOCH = 1;
using Clock = std::array<u32, MAX_AGENTS>;

inline void join(Clock& a, const Clock& b) {
  for (int k = 0; k < MAX_AGENTS; k++) a[k] = a[k] > b[k] ? a[k] : b[k];
}

struct Warp;
struct Instruction;
using Operation = void (*)(Warp&, const Instruction&);

// What each operation makes of operands and immediates is said where it is defined.
struct Instruction {
  Operation run;
  const s32* op;  // registers
  s32 count;
  s32 guard;  // predicate register, -1: none
  bool negated;
  s32 target;  // of a branch, -1: none
  s64 imm[4];
};

enum RegisterClass : u8 { PREDICATE, WORD, DOUBLE };

// A launch's tensor storage, with one cell for each granule.
struct GlobalCell {
  u32 writer = 0, reader = 0;  // program + 1; 0: nobody; of readers also SEVERAL
  u32 write_clock = 0, read_clock = 0;
  u8 write_warp = 0, read_warp = 0;
};
struct Storage {
  u64 base, size;
  std::vector<GlobalCell> cells;  // empty: not watched
};

enum class Content : u8 { NOTHING, VALUE, COPY_UNDER_WAY };
enum class Proxy : u8 { GENERIC, CP_ASYNC, ASYNC };
struct SharedCell {
  u8 agent = 0, lane = 0;  // the last writer
  Content content = Content::NOTHING;
  Proxy proxy = Proxy::GENERIC;
  u32 clock = 0, warp_epoch = 0;
  u32 async_readers = 0;  // wgmma and bulk stores that may still read it
};

struct Report {
  std::string message;
  u64 times;
};

struct Machine {
  // The program
  std::vector<Instruction> code;
  std::vector<s32> operands;
  std::vector<RegisterClass> classes;
  std::vector<u32> offsets;  // of a register's words in the file
  std::vector<u32> initial_words, initial_defined;
  int n_warps;
  u32 shared_bytes;
  int shared_shift, global_shift;  // log2 of a granule's bytes

  // The launch
  u32 grid[3];
  std::vector<u8> parameters;
  std::vector<Storage> storages;
  Storage* last_storage = nullptr;
  u64 instruction_limit;  // of one program
  u32 schedule;  // 0: each warp runs until it blocks; else the seed of a random interleaving

  // What came of it
  std::map<std::pair<std::string, int>, Report> reports;  // by kind and instruction
  std::vector<u64> hits;                                  // by instruction
  u64 executed = 0, program_start = 0;
  bool stopped = false;  // by a finding after which nothing makes sense
};

struct CtaBarrier {
  u32 arrived = 0, expected = 0;
  std::vector<int> warps;
};

struct Mbarrier {
  bool valid = false;
  u32 count = 0, pending = 0, phase = 0;
  s64 bytes = 0;  // still to come
  int agent = 0;
  Clock clock{};     // of those that arrived in this phase
  Clock released{};  // of the phase that was completed last
};

struct BulkLoad {
  std::vector<std::pair<u32, u32>> pieces;  // shared address, bytes
  std::vector<u8> data;
  u32 mbarrier;
  Clock issuer;
};

struct Cta {
  Machine* machine;
  u32 id[3], number;
  std::vector<u8> shared;
  std::vector<SharedCell> cells;
  std::vector<u32> reads;  // [cell][warp]: the warp's time of its last read
  std::vector<Warp*> warps;
  std::map<u32, CtaBarrier> barriers;
  std::map<u32, Mbarrier> mbarriers;  // by address
  std::deque<BulkLoad> bulk_loads;
  int n_mbarrier_agents = 0;
};

struct CpAsync {
  u32 address, bytes;
  int lane;
  u8 data[16];
};
struct SharedRange {
  u32 address, bytes;
};
struct WgmmaGroup {
  std::vector<SharedRange> reads;
  std::vector<int> results, operands_a;  // registers
};

enum class State { RUNNING, AT_BARRIER, AT_MBARRIER, DONE };

struct Warp {
  Cta* cta;
  Machine* machine;
  int id;
  State state = State::RUNNING;

  u32 live = ALL_LANES;    // lanes that have not returned
  u32 active = ALL_LANES;  // lanes that execute the current instruction
  int pc = 0;
  bool diverged = false;
  int lane_pc[32];

  u32* words;    // the register file
  u32* defined;  // by register, a bit for each lane
  // By register. A wgmma under way writes it, or reads it as operand A; the wgmma.fence epoch of
  // its last write by another instruction, or of the wait for a wgmma's; 0: never.
  std::vector<u32> wgmma_results, wgmma_operands, written_epoch;
  u32 n_wgmma_registers = 0, fence_epoch = FIRST_FENCE_EPOCH;

  Clock clock{};   // what happened before
  Clock fenced{};  // and is visible to the async proxy
  u32 epoch = 1;   // bar.warp.sync and stronger
  u32 waits_at = 0, waits_phase = 0;

  std::vector<CpAsync> cp_open;
  std::deque<std::vector<CpAsync>> cp_groups;
  WgmmaGroup wgmma_open;
  std::deque<WgmmaGroup> wgmma_groups;
  std::vector<SharedRange> bulk_open;
  std::deque<std::vector<SharedRange>> bulk_groups;

  template <class T>
  T* lanes(int r) {
    return reinterpret_cast<T*>(words + machine->offsets[r]);
  }
  u32 predicate(int r) { return words[machine->offsets[r]]; }
  bool runs(int lane) const { return active >> lane & 1; }
};

void run_cta(Machine& m, u32 x, u32 y, u32 z);
bool complete_bulk_load(Cta& cta);  // the one under way longest; false: there is none

void report(Warp& w, const char* kind, const std::string& message);
[[gnu::format(printf, 1, 2)]] std::string text(const char* format, ...);

// The operations by name; Python's instructions.py makes the names.
using Table = std::map<std::string, Operation>;
const Table& table();
void add_integers(Table&);
void add_floats(Table&);
void add_conversions(Table&);
void add_moves(Table&);
void add_lane_exchange(Table&);
void add_memory(Table&);
void add_tensor_cores(Table&);
void add_wgmma(Table&);
void add_barriers(Table&);
void add_bulk_copies(Table&);

}  // namespace ptx
