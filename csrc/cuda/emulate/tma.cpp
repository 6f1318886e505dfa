// TMA: copies of boxes of a tensor to shared memory, swizzled, with zeros outside the tensor.
//
// Written from the PTX and driver documents, not from the kernel: where a copy starts, how the
// im2col mode walks its base pixels through the box between the corners, what is filled with zero.
#include <cstring>

#include "cuda/emulate/async.h"
#include "cuda/sm90/tensor_map.h"

namespace resnet_fused::sm90 {

// What cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col refuse.
const char* encode(const MapFields& f, TensorMap* map) {
  const int rank = f.rank;
  if (rank < 3 || rank > 4 || (f.im2col && rank != 4)) return "unknown rank";
  if (reinterpret_cast<uintptr_t>(f.base) % 16) return "the address is not a multiple of 16";
  for (int i = 0; i < rank; ++i) {
    if (f.size[i] < 1 || f.size[i] > 1ull << 32) return "a size is outside 1 to 2^32";
    if (f.stride[i] < 1 || f.stride[i] > 8) return "a traversal stride is outside 1 to 8";
  }
  for (int i = 0; i + 1 < rank; ++i)
    if (f.stride_bytes[i] % 16 || f.stride_bytes[i] >= 1ull << 40)
      return "a stride is not a multiple of 16 bytes below 2^40";
  const int span = f.swizzle_bytes;
  if (span != 128 && span != 64 && span != 32) return "unknown swizzle";
  if (f.box[0] * 2 % 16 || int(f.box[0] * 2) > span) return "the box is wider than the swizzle";
  if (f.im2col) {
    for (int i = 0; i < 2; ++i)
      if (f.lower[i] < -128 || f.lower[i] > 127 || f.upper[i] < -128 || f.upper[i] > 127)
        return "a corner is outside -128 to 127";
    if (f.box[1] < 1 || f.box[1] > 1024) return "pixels per column are outside 1 to 1024";
  } else {
    for (int i = 0; i < rank; ++i)
      if (f.box[i] < 1 || f.box[i] > 256) return "a side of the box is outside 1 to 256";
  }
  *map = f;
  return nullptr;
}

}  // namespace resnet_fused::sm90

namespace emu {

using resnet_fused::sm90::MapFields;
int barrier_of_copy(uint32_t address);
void count_bytes(int index, int64_t bytes);

static void start(Copy copy, const MapFields& map, uint32_t barrier) {
  Async& a = async();
  copy.barrier = barrier_of_copy(barrier);
  copy.swizzle = map.swizzle_bytes;
  copy.issuer = F->id;
  const uint32_t bytes = uint32_t(copy.data.size());
  if (copy.to % 128) fail("TMA: shared address %u is not a multiple of 128", copy.to);
  shared_offset(copy.to, int(bytes), "TMA");
  if (dev_flags(map.base) & kDependent && !a.depends_waited[F->id])
    fail("TMA reads what an earlier kernel writes, before griddepcontrol.wait");
  for (uint32_t i = 0; i < bytes; i += 16) {
    const int64_t at = shared_offset(swizzled(copy.to + i, copy.swizzle), 16, "TMA");
    check_async_write(a, at / 16, F->id, "TMA");
    a.chunks[at / 16].state = kInFlight;
    memset(B->base() + at, 0xff, 16);
  }
  a.copies.push_back(std::move(copy));
}

bool land_a_copy(Async& a, size_t which) {
  Copy copy = std::move(a.copies[which]);
  a.copies.erase(a.copies.begin() + which);
  const MBarrier& b = a.barriers[copy.barrier];
  for (size_t i = 0; i < copy.data.size(); i += 16) {
    const int64_t at = int64_t(swizzled(copy.to + uint32_t(i), copy.swizzle)) - kBase;
    memcpy(B->base() + at, &copy.data[i], 16);
    Chunk& c = a.chunks[at / 16];
    c.state = kLanded;
    c.barrier = uint8_t(copy.barrier);
    c.phase = b.phase;
    landed(at, 16, copy.issuer);
  }
  count_bytes(copy.barrier, int64_t(copy.data.size()));
  return true;
}

// One row of the copy: `count` elements along the innermost dimension, `in`: the rest of its
// coordinates are inside the tensor.
static void put_row(Copy& copy, const MapFields& map, uint64_t row_bytes, bool in, int c) {
  const char* const base = static_cast<const char*>(map.base) + row_bytes;
  const size_t old = copy.data.size();
  copy.data.resize(old + 2 * map.box[0]);  // zeros
  for (uint32_t j = 0; j < map.box[0]; ++j) {
    if (!in || c + int64_t(j) < 0 || c + int64_t(j) >= int64_t(map.size[0])) continue;
    global(base + 2 * (c + int64_t(j)), 2, false);
    memcpy(&copy.data[old + 2 * j], base + 2 * (c + int64_t(j)), 2);
  }
}
static bool inside(int64_t i, uint64_t size) { return i >= 0 && i < int64_t(size); }

void tma_im2col(uint32_t to, const MapFields& map, uint32_t barrier, const int (&at)[4],
                int offset_w, int offset_h, int line) {
  F->line = line;
  if (!map.im2col) fail("TMA: an im2col copy through a tiled map");
  if (offset_w > 255 || offset_h > 255) fail("TMA: an offset of rank 4 has 8 bits");
  // The last base pixel, inclusive, of the box.
  const int last_w = int(map.size[1]) - 1 + map.upper[0];
  const int last_h = int(map.size[2]) - 1 + map.upper[1];
  int w = at[1], h = at[2], n = at[3];
  if (w < map.lower[0] || w > last_w || h < map.lower[1] || h > last_h)
    fail("TMA: start (w %d, h %d) outside the box (%d..%d, %d..%d)", w, h, map.lower[0], last_w,
         map.lower[1], last_h);
  Copy copy{};
  copy.to = to;
  for (uint32_t i = 0; i < map.box[1]; ++i) {
    const int x = w + offset_w, y = h + offset_h;
    const bool in = inside(x, map.size[1]) && inside(y, map.size[2]) && inside(n, map.size[3]);
    put_row(copy, map,
            in ? x * map.stride_bytes[0] + y * map.stride_bytes[1] + n * map.stride_bytes[2] : 0,
            in, at[0]);
    w += int(map.stride[1]);
    if (w > last_w) {
      w = map.lower[0];
      h += int(map.stride[2]);
      if (h > last_h) {
        h = map.lower[1];
        ++n;
      }
    }
  }
  start(std::move(copy), map, barrier);
}

void tma_tile(uint32_t to, const MapFields& map, uint32_t barrier, const int (&at)[4], int line) {
  F->line = line;
  if (map.im2col) fail("TMA: a tiled copy through an im2col map");
  Copy copy{};
  copy.to = to;
  // A box of b elements walked in steps of s has ceil(b / s) of them.
  int count[4] = {1, 1, 1, 1};
  for (int i = 1; i < map.rank; ++i)
    count[i] = int((map.box[i] + map.stride[i] - 1) / map.stride[i]);
  for (int d3 = 0; d3 < count[3]; ++d3)
    for (int d2 = 0; d2 < count[2]; ++d2)
      for (int d1 = 0; d1 < count[1]; ++d1) {
        const int64_t steps[4] = {0, d1, d2, d3};
        bool in = true;
        uint64_t row = 0;
        for (int i = 1; i < map.rank; ++i) {
          const int64_t x = at[i] + steps[i] * map.stride[i];
          in = in && inside(x, map.size[i]);
          row += uint64_t(x) * map.stride_bytes[i - 1];
        }
        put_row(copy, map, in ? row : 0, in, at[0]);
      }
  start(std::move(copy), map, barrier);
}

}  // namespace emu
