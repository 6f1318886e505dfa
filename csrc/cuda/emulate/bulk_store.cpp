// Stores of TMA, and the ldmatrix and stmatrix that go with them. A store is checked when it is
// issued, and reads shared memory as late as it may: when its thread waits for it.
#include <cstring>

#include "cuda/emulate/async.h"
#include "cuda/sm90/tensor_map.h"

namespace emu {

using resnet_fused::sm90::MapFields;

// ---- matrices: a warp's rows of 16 bytes ----
namespace {

struct Matrices {
  uint32_t* words;
  uint32_t row;
  bool transposed;
  int count;
};
// The running lane is the warp's last to come; checks are of the lane that names the row.
void each_row(void* const* args, uint32_t mask, const char* what, bool write) {
  if (mask != ~0u) fail("%s: the warp has fewer than 32 lanes", what);
  Fiber* const last = F;
  const int count = static_cast<Matrices*>(args[0])->count;
  for (int i = 0; i < 8 * count; ++i) {
    const int64_t at = shared_offset(static_cast<Matrices*>(args[i])->row, 16, what);
    if (at % 16) fail("%s: misaligned row address of lane %d", what, i);
    F = &B->fibers[(last->id & ~31) + i];
    touch(at, 16, write, F->id);
    plain_access(at, 16, write);
    F = last;
  }
}
uint16_t* element(void* const* args, int matrix, int row, int column) {
  const uint32_t address = static_cast<Matrices*>(args[8 * matrix + row])->row;
  return reinterpret_cast<uint16_t*>(B->base() + (address - kBase)) + column;
}
// Lane l has of each matrix row l / 4, columns 2 * (l % 4) and the next; or transposed.
template <typename Move>
void each_element(void* const* args, const Move& move) {
  for (int l = 0; l < 32; ++l) {
    const Matrices& mine = *static_cast<Matrices*>(args[l]);
    for (int m = 0; m < mine.count; ++m)
      for (int i = 0; i < 2; ++i) {
        int row = l / 4, column = 2 * (l % 4) + i;
        if (mine.transposed) std::swap(row, column);
        move(reinterpret_cast<uint16_t*>(&mine.words[m]) + i, element(args, m, row, column));
      }
  }
}
void load_exec(void* const* args, uint32_t mask) {
  each_row(args, mask, "ldmatrix", false);
  each_element(args, [](uint16_t* word, const uint16_t* there) { *word = *there; });
}
void store_exec(void* const* args, uint32_t mask) {
  each_row(args, mask, "stmatrix", true);
  each_element(args, [](const uint16_t* word, uint16_t* there) { *there = *word; });
}

}  // namespace

void load_matrices(uint32_t* words, uint32_t row, bool transposed, int count, int line) {
  Matrices m{words, row, transposed, count};
  collective(load_exec, "ldmatrix", ~0u, &m, line);
}
void store_matrices(const uint32_t* words, uint32_t row, bool transposed, int count, int line) {
  Matrices m{const_cast<uint32_t*>(words), row, transposed, count};
  collective(store_exec, "stmatrix", ~0u, &m, line);
}

// ---- stores ----
void tma_store(uint32_t from, const MapFields& map, const int (&at)[4], int line) {
  F->line = line;
  Async& a = async();
  if (map.im2col || map.rank != 4) fail("TMA: a store through an im2col map, or of another rank");
  if (from % 128) fail("TMA: shared address %u is not a multiple of 128", from);
  if (dev_flags(map.base) & kDependent && !a.depends_waited[F->id])
    fail("TMA writes what an earlier kernel uses, before griddepcontrol.wait");
  BulkStore store{F->id, false, {}};
  const int row_bytes = int(2 * map.box[0]);
  int row = 0;
  for (int n = 0; n < int(map.box[3]); ++n)
    for (int h = 0; h < int(map.box[2]); ++h)
      for (int w = 0; w < int(map.box[1]); ++w, ++row) {
        const int64_t x[4] = {at[0], at[1] + w, at[2] + h, at[3] + n};
        const auto in = [&](int i, int64_t v) { return v >= 0 && v < int64_t(map.size[i]); };
        if (!in(1, x[1]) || !in(2, x[2]) || !in(3, x[3])) continue;
        char* const to = static_cast<char*>(const_cast<void*>(map.base)) +
                         x[1] * map.stride_bytes[0] + x[2] * map.stride_bytes[1] +
                         x[3] * map.stride_bytes[2];
        for (int i = 0; i < row_bytes / 16; ++i) {
          const int64_t c = x[0] + 8 * i;
          if (!in(0, c)) continue;
          const int64_t there = shared_offset(
              swizzled(from + row * row_bytes + 16 * i, map.swizzle_bytes), 16, "TMA");
          check_async_read(a, there / 16, F->id / 32, "TMA");
          a.chunks[there / 16].being_read++;
          store.chunks.push_back({there, to + 2 * c});
        }
      }
  a.stores.push_back(std::move(store));
}
void commit_stores() {
  for (BulkStore& s : async().stores)
    if (s.issuer == F->id) s.committed = true;
}
void wait_for_stores(int line) {
  F->line = line;
  Async& a = async();
  const int warp = F->id / 32;
  for (size_t i = 0; i < a.stores.size();) {
    if (a.stores[i].issuer != F->id || !a.stores[i].committed) {
      ++i;
      continue;
    }
    const BulkStore store = std::move(a.stores[i]);
    a.stores.erase(a.stores.begin() + i);
    for (const auto& [there, to] : store.chunks) {
      a.chunks[there / 16].being_read--;
      a.reads[there / 16 * B->nw + warp] = B->warps[warp].vc[warp];
      global(to, 16, true);
      memcpy(to, B->base() + there, 16);
    }
  }
  B->warps[warp].vc[warp]++;
}

}  // namespace emu
