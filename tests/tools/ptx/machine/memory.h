// Shared memory, the tensors' memory, and their shadows: who wrote a granule, by which proxy, who
// read it, what is on its way there.
#pragma once
#include "registers.h"

namespace ptx {

constexpr int NO_LANE = -1;  // an access of the whole warp, not of one lane

inline bool in_shared(Warp& w, u64 address, u32 bytes) {
  return address + bytes <= w.cta->shared.size();
}

// The shadow cells of [address, address + bytes)
struct Cells {
  u32 first, last;
  Cells(const Machine& m, u32 address, u32 bytes)
      : first(address >> m.shared_shift), last((address + bytes - 1) >> m.shared_shift) {}
};

// Notes a read by this warp and reports what forbids it; false where the bytes hold no value.
// `async`: through the async proxy (wgmma, bulk stores).
bool read_shared(Warp& w, u32 address, u32 bytes, int lane, bool async = false);

// Reports what forbids a write now. `same`: the bytes stay what they are, as where several warps
// hold a value and each writes it; no other order of theirs would show. `async`: by a bulk copy.
void check_shared_write(Warp& w, u32 address, u32 bytes, bool same = false, bool async = false);

void mark_shared(Warp& w, u32 address, u32 bytes, int lane, Content content, Proxy proxy);
void write_shared(Warp& w, u32 address, const u8* data, u32 bytes, int lane, bool defined);

// Something asynchronous reads the bytes from now until `end_async_reads`.
void begin_async_read(Warp& w, SharedRange range);
void end_async_reads(Warp& w, const std::vector<SharedRange>& ranges);

// What wgmma descriptors and tensor maps call a swizzle, as descriptors number them.
enum Swizzle { NO_SWIZZLE, SWIZZLE_128, SWIZZLE_64, SWIZZLE_32 };

inline u32 swizzle_bytes(int swizzle) { return swizzle == NO_SWIZZLE ? 16 : 256u >> swizzle; }

// Exclusive or of the address's bits 4.. with its bits 7..: three, two or one of them.
inline u32 swizzled(u32 address, int swizzle) {
  if (swizzle == NO_SWIZZLE) return address;
  return address ^ (address >> 7 & ((16u >> swizzle) - 1)) << 4;
}

// The mbarrier at an address, or nullptr and a report.
Mbarrier* find_mbarrier(Warp& w, u64 address);

// Ends the phase if all arrivals and bytes have come.
void advance(Mbarrier& b);

// ------------------------------------------------------------------------------ tensor memory

// The storage that holds the bytes, or nullptr and a report.
Storage* find_global(Warp& w, u64 address, u32 bytes, int lane, const char* access);
void read_global(Warp& w, Storage& storage, u64 address, u32 bytes);
void write_global(Warp& w, Storage& storage, u64 address, u32 bytes, bool same);

bool is_aligned(Warp& w, u64 address, u32 bytes, int lane);

}  // namespace ptx
