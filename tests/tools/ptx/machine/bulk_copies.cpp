// cp.async.bulk.tensor: a box of a tensor to or from shared memory, through the async proxy.
#include <cstring>

#include "memory.h"

namespace ptx {

bool complete_bulk_load(Cta& cta) {
  if (cta.bulk_loads.empty()) return false;
  BulkLoad load = std::move(cta.bulk_loads.front());
  cta.bulk_loads.pop_front();
  Mbarrier& b = cta.mbarriers[load.mbarrier];
  int shift = cta.machine->shared_shift;
  size_t at = 0;
  for (auto [address, bytes] : load.pieces) {
    std::memcpy(&cta.shared[address], &load.data[at], bytes);
    at += bytes;
    for (u32 c = address >> shift; c <= (address + bytes - 1) >> shift; c++) {
      SharedCell& cell = cta.cells[c];
      cell.content = Content::VALUE, cell.proxy = Proxy::ASYNC;
      cell.agent = b.agent, cell.clock = b.clock[b.agent];
    }
  }
  join(b.clock, load.issuer);
  b.bytes -= s64(load.data.size());
  advance(b);
  return true;
}

namespace {

// What the launcher describes a tensor by; the counterpart of _TensorMap in launches.py. Dimension
// 0 is the innermost; strides are in bytes.
struct TensorMap {
  u64 base;
  u32 rank, element_bytes, swizzle, unused;
  u64 shape[5], stride[5];
  u32 box[5], unused_end;
};

// Where a CUtensorMap stands among the parameters, there is this mark, and a TensorMap's address.
constexpr u64 TENSOR_MAP_MARK = 0x50414d524f534e54;

const TensorMap* tensor_map(Warp& w, u64 address) {
  const std::vector<u8>& parameters = w.machine->parameters;
  u64 start = reinterpret_cast<u64>(parameters.data());
  u64 words[2] = {};
  if (address >= start && address + 128 <= start + parameters.size())
    std::memcpy(words, reinterpret_cast<const void*>(address), sizeof words);
  if (words[0] != TENSOR_MAP_MARK || (address - start) % 64) {
    report(w, "tensor-map", "none at this address, or not at a multiple of 64 bytes");
    w.machine->stopped = true;
    return nullptr;
  }
  return reinterpret_cast<const TensorMap*>(words[1]);
}

// One piece of at most 16 bytes of a box, and where each of its elements lies in the tensor.
struct Piece {
  u32 shared, bytes;
  u64 row;     // address of the tensor's row, 0: outside
  s64 column;  // of the first element
};

struct Box {
  const TensorMap& map;
  std::vector<Piece> pieces;

  Box(Warp& w, const TensorMap& map, const s32* coordinates, u32 shared) : map(map) {
    u32 alignment = map.swizzle == NO_SWIZZLE ? 128 : 8 * swizzle_bytes(map.swizzle);
    if (shared % alignment)
      report(w, "misaligned", text("a box at shared 0x%x, no multiple of %u", shared, alignment));
    u32 row_bytes = map.box[0] * map.element_bytes, n_rows = 1;
    for (u32 d = 1; d < map.rank; d++) n_rows *= map.box[d];
    if (!in_shared(w, shared, n_rows * row_bytes)) {
      report(w, "shared-bounds", text("a box of %u bytes at 0x%x", n_rows * row_bytes, shared));
      return;
    }
    for (u32 n = 0; n < n_rows; n++) {
      bool inside = true;
      u64 row = map.base;
      for (u32 d = 1, rest = n; d < map.rank; rest /= map.box[d], d++) {
        s64 at = s64(coordinates[d]) + rest % map.box[d];
        inside &= at >= 0 && at < s64(map.shape[d]);
        row += at * map.stride[d];
      }
      for (u32 x = 0; x < row_bytes; x += 16)
        pieces.push_back({swizzled(shared + n * row_bytes + x, map.swizzle),
                          std::min(16u, row_bytes - x), inside ? row : 0,
                          s64(coordinates[0]) + x / map.element_bytes});
    }
  }

  // The address of an element of a piece, 0: outside of the tensor, where loads give 0.
  u64 address(const Piece& piece, u32 offset) const {
    s64 column = piece.column + offset / map.element_bytes;
    bool inside = piece.row && column >= 0 && column < s64(map.shape[0]);
    return inside ? piece.row + column * map.element_bytes : 0;
  }
};

bool get_coordinates(Warp& w, const Instruction& i, int first, const TensorMap& map, int lane,
                     s32* out) {
  if (i.count - first != int(map.rank)) {
    report(w, "tensor-map", text("%d coordinates for rank %u", i.count - first, map.rank));
    return false;
  }
  for (u32 d = 0; d < map.rank; d++) out[d] = w.lanes<s32>(i.op[first + d])[lane];
  return true;
}

// Operands: destination, map, mbarrier, coordinates. Immediates: offsets of destination, mbarrier.
void load_lane(Warp& w, const Instruction& i, int lane) {
  u32 to = number(w, i.op[0], lane) + i.imm[0], barrier = number(w, i.op[2], lane) + i.imm[1];
  const TensorMap* map = tensor_map(w, number(w, i.op[1], lane));
  s32 coordinates[5];
  if (!map || !find_mbarrier(w, barrier) || !get_coordinates(w, i, 3, *map, lane, coordinates))
    return;
  BulkLoad load{{}, {}, barrier, w.clock};
  Box box(w, *map, coordinates, to);
  for (const Piece& piece : box.pieces) {
    u8 data[16] = {};
    for (u32 x = 0; x < piece.bytes; x += map->element_bytes) {
      u64 address = box.address(piece, x);
      Storage* storage =
          address ? find_global(w, address, map->element_bytes, lane, "a bulk copy reads")
                  : nullptr;
      if (!storage) continue;
      std::memcpy(data + x, reinterpret_cast<const void*>(address), map->element_bytes);
      read_global(w, *storage, address, map->element_bytes);
    }
    check_shared_write(w, piece.shared, piece.bytes, false, true);
    mark_shared(w, piece.shared, piece.bytes, lane, Content::COPY_UNDER_WAY, Proxy::ASYNC);
    std::memset(&w.cta->shared[piece.shared], 0xff, piece.bytes);
    load.pieces.push_back({piece.shared, piece.bytes});
    load.data.insert(load.data.end(), data, data + piece.bytes);
  }
  w.cta->bulk_loads.push_back(std::move(load));
}

// Operands: map, source, coordinates. imm[0]: the source's offset.
void store_lane(Warp& w, const Instruction& i, int lane) {
  const TensorMap* map = tensor_map(w, number(w, i.op[0], lane));
  s32 coordinates[5];
  if (!map || !get_coordinates(w, i, 2, *map, lane, coordinates)) return;
  Box box(w, *map, coordinates, number(w, i.op[1], lane) + i.imm[0]);
  for (const Piece& piece : box.pieces) {
    if (!read_shared(w, piece.shared, piece.bytes, NO_LANE, true))
      report(w, "uninitialised",
             text("a bulk store reads shared 0x%x, where nothing was written", piece.shared));
    begin_async_read(w, {piece.shared, piece.bytes});
    w.bulk_open.push_back({piece.shared, piece.bytes});
    for (u32 x = 0; x < piece.bytes; x += map->element_bytes) {
      u64 address = box.address(piece, x);
      Storage* storage =
          address ? find_global(w, address, map->element_bytes, lane, "a bulk copy writes")
                  : nullptr;
      if (!storage) continue;
      write_global(w, *storage, address, map->element_bytes, false);
      std::memcpy(reinterpret_cast<void*>(address), &w.cta->shared[piece.shared + x],
                  map->element_bytes);
    }
  }
}

template <void (*F)(Warp&, const Instruction&, int)>
void each_active_lane(Warp& w, const Instruction& i) {
  for (int k = 0; k < i.count; k++) require_defined(w, i.op[k], "an operand of a bulk copy");
  for (int l = 0; l < 32 && !w.machine->stopped; l++)
    if (w.runs(l)) F(w, i, l);
}

}  // namespace

void add_bulk_copies(Table& t) {
  t["bulk.load"] = each_active_lane<load_lane>;
  t["bulk.store"] = each_active_lane<store_lane>;
  t["bulk.commit_group"] = [](Warp& w, const Instruction&) {
    w.bulk_groups.push_back(std::move(w.bulk_open));
    w.bulk_open.clear();
  };
  t["bulk.wait_group"] = [](Warp& w, const Instruction& i) {
    while (w.bulk_groups.size() > size_t(i.imm[0])) {
      end_async_reads(w, w.bulk_groups.front());
      w.bulk_groups.pop_front();
    }
  };
}

}  // namespace ptx
