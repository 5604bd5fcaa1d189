// ld, st and cp.async.
#include <cstring>

#include "memory.h"

namespace ptx {
namespace {

// Operands: the elements, the base address. Immediates: offset, bytes an element, elements,
// whether they are signed.
struct Access {
  int n, element, bytes;
  s32 base;
  u64 address[32];
  Access(Warp& w, const Instruction& i)
      : n(i.count - 1), element(i.imm[1]), bytes(n * element), base(i.op[n]) {
    check_not_in_flight(w, i);
    require_defined(w, base, "an address");
    for (int l = 0; l < 32; l++) address[l] = number(w, base, l) + i.imm[0];
  }
};

void set_elements(Warp& w, const Instruction& i, int n, int element, int lane, const u8* data) {
  for (int k = 0; k < n; k++) {
    u64 value = 0;
    std::memcpy(&value, data + k * element, element);
    int unused = 64 - 8 * element;
    if (i.imm[3]) value = u64(s64(value << unused) >> unused);
    set_number(w, i.op[k], lane, value);
  }
}

void collect(Warp& w, const Instruction& i, const Access& a, int lane, u8* data) {
  for (int k = 0; k < a.n; k++) {
    u64 value = number(w, i.op[k], lane);
    std::memcpy(data + k * a.element, &value, a.element);
  }
}

void load_parameter(Warp& w, const Instruction& i) {
  int n = i.count - 1, element = i.imm[1];
  const std::vector<u8>& parameters = w.machine->parameters;
  if (size_t(i.imm[0] + n * element) > parameters.size()) {
    report(w, "parameter", "reads outside of the parameters");
    return;
  }
  for (int l = 0; l < 32; l++)
    if (w.runs(l)) set_elements(w, i, n, element, l, &parameters[i.imm[0]]);
  for (int k = 0; k < n; k++) set_defined(w, i.op[k], ALL_LANES);
}

void load_global(Warp& w, const Instruction& i) {
  Access a(w, i);
  u32 defined = ALL_LANES;
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l)) continue;
    u8 data[32] = {};
    Storage* storage = nullptr;
    if (is_aligned(w, a.address[l], a.bytes, l))
      storage = find_global(w, a.address[l], a.bytes, l, "reads");
    if (storage) {
      std::memcpy(data, reinterpret_cast<const void*>(a.address[l]), a.bytes);
      read_global(w, *storage, a.address[l], a.bytes);
    } else {
      defined &= ~(1u << l);
    }
    set_elements(w, i, a.n, a.element, l, data);
  }
  for (int k = 0; k < a.n; k++) set_defined(w, i.op[k], defined);
}

void store_global(Warp& w, const Instruction& i) {
  Access a(w, i);
  for (int k = 0; k < a.n; k++) require_defined(w, i.op[k], "what is stored to a tensor");
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l) || !is_aligned(w, a.address[l], a.bytes, l)) continue;
    Storage* storage = find_global(w, a.address[l], a.bytes, l, "writes");
    if (!storage) continue;
    u8 data[32];
    collect(w, i, a, l, data);
    void* memory = reinterpret_cast<void*>(a.address[l]);
    write_global(w, *storage, a.address[l], a.bytes, std::memcmp(memory, data, a.bytes) == 0);
    std::memcpy(memory, data, a.bytes);
  }
}

bool shared_access(Warp& w, u64 address, u32 bytes, int lane, const char* access) {
  if (!is_aligned(w, address, bytes, lane)) return false;
  if (in_shared(w, address, bytes)) return true;
  report(w, "shared-bounds",
         text("%s %u bytes at 0x%llx", access, bytes, (unsigned long long)address));
  return false;
}

void load_shared(Warp& w, const Instruction& i) {
  Access a(w, i);
  u32 defined = ALL_LANES;
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l)) continue;
    u8 data[32] = {};
    if (shared_access(w, a.address[l], a.bytes, l, "reads")) {
      if (!read_shared(w, a.address[l], a.bytes, l)) defined &= ~(1u << l);
      std::memcpy(data, &w.cta->shared[a.address[l]], a.bytes);
    } else {
      defined &= ~(1u << l);
    }
    set_elements(w, i, a.n, a.element, l, data);
  }
  for (int k = 0; k < a.n; k++) set_defined(w, i.op[k], defined);
}

void store_shared(Warp& w, const Instruction& i) {
  Access a(w, i);
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l) || !shared_access(w, a.address[l], a.bytes, l, "writes")) continue;
    u8 data[32];
    collect(w, i, a, l, data);
    bool defined = true;
    for (int k = 0; k < a.n; k++) defined &= w.defined[i.op[k]] >> l & 1;
    write_shared(w, a.address[l], data, a.bytes, l, defined);
  }
}

// ------------------------------------------------------------------------------------ cp.async
// The bytes are fetched when the copy is issued and arrive when the warp waits: as late as may be.

// Operands: destination, source, and how many bytes of the source are read if not all. Immediates:
// the offsets of both, bytes.
void copy_async(Warp& w, const Instruction& i) {
  check_not_in_flight(w, i);
  require_defined(w, i.op[0], "an address"), require_defined(w, i.op[1], "an address");
  if (i.count > 2) require_defined(w, i.op[2], "the size of a copy");
  u32 bytes = i.imm[2];
  for (int l = 0; l < 32; l++) {
    if (!w.runs(l)) continue;
    u64 to = number(w, i.op[0], l) + i.imm[0], from = number(w, i.op[1], l) + i.imm[1];
    u32 fetched = i.count > 2 ? w.lanes<u32>(i.op[2])[l] : bytes;
    if (fetched > bytes) {
      report(w, "cp.async", text("reads %u bytes for a copy of %u", fetched, bytes));
      fetched = bytes;
    }
    if (!shared_access(w, to, bytes, l, "cp.async writes")) continue;
    CpAsync copy{u32(to), bytes, l, {}};
    if (fetched) {
      if (!is_aligned(w, from, bytes, l)) continue;
      if (Storage* storage = find_global(w, from, fetched, l, "cp.async reads")) {
        std::memcpy(copy.data, reinterpret_cast<const void*>(from), fetched);
        read_global(w, *storage, from, fetched);
      }
    }
    check_shared_write(w, to, bytes);
    mark_shared(w, to, bytes, l, Content::COPY_UNDER_WAY, Proxy::CP_ASYNC);
    std::memset(&w.cta->shared[to], 0xff, bytes);
    w.cp_open.push_back(copy);
  }
}

void commit(Warp& w, const Instruction&) {
  if (w.active != w.live) report(w, "divergence", "cp.async.commit_group");
  w.cp_groups.push_back(std::move(w.cp_open));
  w.cp_open.clear();
}

// imm[0]: groups that may still be under way
void wait(Warp& w, const Instruction& i) {
  while (w.cp_groups.size() > size_t(i.imm[0])) {
    for (const CpAsync& copy : w.cp_groups.front()) {
      std::memcpy(&w.cta->shared[copy.address], copy.data, copy.bytes);
      mark_shared(w, copy.address, copy.bytes, copy.lane, Content::VALUE, Proxy::CP_ASYNC);
    }
    w.cp_groups.pop_front();
  }
}

}  // namespace

void add_memory(Table& t) {
  t["ld.param"] = load_parameter;
  t["ld.global"] = load_global;
  t["st.global"] = store_global;
  t["ld.shared"] = load_shared;
  t["st.shared"] = store_shared;
  t["cp.async"] = copy_async;
  t["cp.async.commit_group"] = commit;
  t["cp.async.wait_group"] = wait;
  t["cp.async.wait_all"] = [](Warp& w, const Instruction& i) { commit(w, i), wait(w, i); };
}

}  // namespace ptx
