// What may be read and written when.
#include <cstring>

#include "memory.h"

namespace ptx {

// -------------------------------------------------------------------------------- shared memory

static u32& last_read(Warp& w, u32 cell) {
  return w.cta->reads[size_t(cell) * w.machine->n_warps + w.id];
}

// Is what was written there by the generic proxy behind a fence for the async one? cp.async is left
// out: Triton and CUTLASS feed wgmma from it without a fence.
static bool visible_to_async(Warp& w, const SharedCell& cell) {
  return cell.proxy != Proxy::GENERIC || w.fenced[cell.agent] >= cell.clock;
}

bool read_shared(Warp& w, u32 address, u32 bytes, int lane, bool async) {
  Cells cells(*w.machine, address, bytes);
  bool holds_value = true;
  for (u32 c = cells.first; c <= cells.last; c++) {
    const SharedCell& cell = w.cta->cells[c];
    u32 at = c << w.machine->shared_shift;
    if (!async) last_read(w, c) = w.clock[w.id];
    if (cell.content == Content::NOTHING) {
      holds_value = false;
      continue;
    }
    if (cell.content == Content::COPY_UNDER_WAY) {
      report(w, "async-read", text("reads shared 0x%x while a copy to it is under way", at));
      holds_value = false;
      continue;
    }
    bool other_agent = cell.agent != w.id;
    if (other_agent && w.clock[cell.agent] < cell.clock)
      report(
          w, "race",
          text("reads shared 0x%x that agent %d wrote, with no barrier between", at, cell.agent));
    if (!other_agent && !async && lane != NO_LANE && cell.lane != lane &&
        cell.warp_epoch >= w.epoch)
      report(w, "warp-race",
             text("lane %d reads shared 0x%x that lane %d wrote, with no barrier between", lane, at,
                  cell.lane));
    if (async && !visible_to_async(w, cell))
      report(w, "proxy",
             text("the async proxy reads shared 0x%x that st.shared wrote, with no "
                  "fence.proxy.async between",
                  at));
  }
  return holds_value;
}

void check_shared_write(Warp& w, u32 address, u32 bytes, bool same, bool async) {
  Cells cells(*w.machine, address, bytes);
  int n_warps = w.machine->n_warps;
  for (u32 c = cells.first; c <= cells.last; c++) {
    const SharedCell& cell = w.cta->cells[c];
    u32 at = c << w.machine->shared_shift;
    if (cell.content == Content::COPY_UNDER_WAY)
      report(w, "async-write", text("writes shared 0x%x while a copy to it is under way", at));
    if (async && cell.content == Content::VALUE && !visible_to_async(w, cell))
      report(w, "proxy",
             text("a bulk copy overwrites shared 0x%x that st.shared wrote, with no "
                  "fence.proxy.async between",
                  at));
    if (same) continue;
    if (cell.content == Content::VALUE && cell.agent != w.id && w.clock[cell.agent] < cell.clock)
      report(
          w, "race",
          text("writes shared 0x%x that agent %d wrote, with no barrier between", at, cell.agent));
    if (cell.async_readers)
      report(w, "async-overwrite",
             text("writes shared 0x%x while wgmma or a bulk copy reads it", at));
    const u32* reads = &w.cta->reads[size_t(c) * n_warps];
    for (int k = 0; k < n_warps; k++)
      if (reads[k] > w.clock[k] && k != w.id)
        report(w, "race",
               text("writes shared 0x%x that warp %d read, with no barrier between", at, k));
  }
}

void mark_shared(Warp& w, u32 address, u32 bytes, int lane, Content content, Proxy proxy) {
  Cells cells(*w.machine, address, bytes);
  for (u32 c = cells.first; c <= cells.last; c++) {
    SharedCell& cell = w.cta->cells[c];
    cell.agent = w.id, cell.lane = lane, cell.content = content, cell.proxy = proxy;
    cell.clock = w.clock[w.id], cell.warp_epoch = w.epoch;
  }
}

void write_shared(Warp& w, u32 address, const u8* data, u32 bytes, int lane, bool defined) {
  u8* memory = &w.cta->shared[address];
  bool holds_value = w.cta->cells[address >> w.machine->shared_shift].content == Content::VALUE;
  check_shared_write(w, address, bytes, holds_value && std::memcmp(memory, data, bytes) == 0);
  std::memcpy(memory, data, bytes);
  mark_shared(w, address, bytes, lane, defined ? Content::VALUE : Content::NOTHING, Proxy::GENERIC);
}

void begin_async_read(Warp& w, SharedRange range) {
  Cells cells(*w.machine, range.address, range.bytes);
  for (u32 c = cells.first; c <= cells.last; c++) w.cta->cells[c].async_readers++;
}

void end_async_reads(Warp& w, const std::vector<SharedRange>& ranges) {
  for (const SharedRange& range : ranges) {
    Cells cells(*w.machine, range.address, range.bytes);
    for (u32 c = cells.first; c <= cells.last; c++) {
      w.cta->cells[c].async_readers--;
      last_read(w, c) = w.clock[w.id];
    }
  }
}

// ------------------------------------------------------------------------------- tensor memory

constexpr u32 SEVERAL = ~0u;

static bool holds(const Storage& s, u64 address, u32 bytes) {
  return address >= s.base && address + bytes <= s.base + s.size;
}

Storage* find_global(Warp& w, u64 address, u32 bytes, int lane, const char* access) {
  Machine& m = *w.machine;
  if (m.last_storage && holds(*m.last_storage, address, bytes)) return m.last_storage;
  for (Storage& s : m.storages)
    if (holds(s, address, bytes)) return m.last_storage = &s;
  std::string near;
  for (const Storage& s : m.storages) {
    s64 distance = s64(address - s.base);
    if (distance > -(1 << 20) && distance < s64(s.size) + (1 << 20))
      near += text(", %+lld from a tensor of %llu bytes", (long long)distance,
                   (unsigned long long)s.size);
  }
  report(w, "global-bounds",
         text("%s %u bytes in lane %d outside of every tensor", access, bytes, lane) + near);
  return nullptr;
}

static bool unordered(Warp& w, u8 warp, u32 clock) { return warp != w.id && w.clock[warp] < clock; }

void read_global(Warp& w, Storage& storage, u64 address, u32 bytes) {
  if (storage.cells.empty()) return;
  u32 me = w.cta->number + 1;
  int shift = w.machine->global_shift;
  for (u64 c = (address - storage.base) >> shift;
       c <= (address + bytes - 1 - storage.base) >> shift; c++) {
    GlobalCell& cell = storage.cells[c];
    if (cell.writer && cell.writer != me)
      report(w, "global-race", text("reads what program %u wrote", cell.writer - 1));
    else if (cell.writer == me && unordered(w, cell.write_warp, cell.write_clock))
      report(w, "global-race", "reads what another warp wrote, with no barrier between");
    cell.reader = cell.reader == 0 || cell.reader == me ? me : SEVERAL;
    cell.read_warp = w.id, cell.read_clock = w.clock[w.id];
  }
}

void write_global(Warp& w, Storage& storage, u64 address, u32 bytes, bool same) {
  if (storage.cells.empty()) return;
  u32 me = w.cta->number + 1;
  int shift = w.machine->global_shift;
  for (u64 c = (address - storage.base) >> shift;
       c <= (address + bytes - 1 - storage.base) >> shift; c++) {
    GlobalCell& cell = storage.cells[c];
    if (!same && cell.writer && cell.writer != me)
      report(w, "global-race", text("writes what program %u wrote", cell.writer - 1));
    else if (!same && cell.writer == me && unordered(w, cell.write_warp, cell.write_clock))
      report(w, "global-race", "writes what another warp wrote, with no barrier between");
    if (cell.reader && cell.reader != me)
      report(w, "global-race", "writes what another program read");
    else if (cell.reader == me && unordered(w, cell.read_warp, cell.read_clock))
      report(w, "global-race", "writes what another warp read, with no barrier between");
    cell.writer = me, cell.write_warp = w.id, cell.write_clock = w.clock[w.id];
  }
}

bool is_aligned(Warp& w, u64 address, u32 bytes, int lane) {
  if (address % bytes == 0) return true;
  report(w, "misaligned",
         text("%u bytes in lane %d at an address that is %llu more than a multiple", bytes, lane,
              (unsigned long long)(address % bytes)));
  return false;
}

}  // namespace ptx
