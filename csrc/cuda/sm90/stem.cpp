// What the stem's kernel serves, how the work is cut, and where things lie; without the CUDA
// runtime.
#include "cuda/sm90/stem.h"

#include <algorithm>

#include "check.h"

namespace resnet_fused::sm90 {
namespace {

constexpr int kSharedOfSm = 228 << 10, kSharedOfRuntime = 1 << 10;  // documented; of each block

using cuda::pooled;
using cuda::up_to;

struct Sizes {
  int64_t chunks, positions, raw_pitch, ring_pitch, ring_rows, raw, ring, bytes;
};
Sizes sizes_of(const Problem& p, const StemTile& tile) {
  Sizes s;
  s.chunks = up_to((int64_t(p.s) + 1) / 2, 2);
  s.positions = tile.columns + s.chunks - 1;
  // A row begins up to 14 bytes before the first pixel that is needed.
  s.raw_pitch = up_to(4 * s.positions * p.c + 14, 16);
  s.ring_pitch = 16 * s.positions;
  // What a pooled row needs, and what the next adds while slow warps still multiply.
  s.ring_rows = int64_t(p.r) + 3 * int64_t(p.stride_h);
  const int64_t raw_rows = int64_t(p.r) + 2 * int64_t(p.stride_h);  // of a band's first pooled row
  s.raw = p.r * s.chunks * kStemChannels * 16;
  s.ring = s.raw + raw_rows * s.raw_pitch;
  const int64_t staged = int64_t(2) * kStemChannels * p.r * p.s * p.c;
  s.bytes = s.ring + std::max(s.ring_rows * s.ring_pitch, up_to(staged, 16));
  return s;
}
int resident(const Problem& p, const StemTile& tile) {
  const int bytes = int(stem_shared_bytes(p, tile));
  return std::max(1, std::min(tile.blocks_per_sm, kSharedOfSm / (bytes + kSharedOfRuntime)));
}
int tiles_of_w(const Problem& p, const StemTile& tile) {
  const int pairs = tile.columns / 2, more = pooled(out_w(p)) - pairs;
  return more <= 0 ? 1 : 1 + ceil_div(more, pairs - 1);
}

// Clocks of the busiest multiprocessor, modelled. They order the cuts as an H100's times do, but
// come to 55 us where it took 100 (ResNet's stem, 128 images).
double clocks(const Problem& p, const StemChoice& choice, const Device& device) {
  constexpr double kMacsPerClock = 2048;                  // documented
  constexpr double kBandClocks = 1500, kRowClocks = 300;  // assumed: first rows; all but products
  const StemTile& tile = kStemTiles[choice.tile];
  const Sizes s = sizes_of(p, tile);
  const double items = double(p.n) * ceil_div(pooled(out_h(p)), choice.rows) * tiles_of_w(p, tile) *
                       ceil_div(p.k, kStemChannels);
  const auto rounds = [items](double at_once) {
    return double(int64_t((items - 1) / at_once) + 1);
  };
  const double row = 8.0 * p.r * s.chunks * kStemChannels * tile.columns / kMacsPerClock;
  const double rows = 2 * choice.rows + 1, at_once = device.multiprocessors;
  const double products = rounds(at_once) * rows * row;
  const double alone =
      rounds(at_once * resident(p, tile)) * (kBandClocks + rows * (row + kRowClocks));
  return std::max(products + alone / 4, alone);
}

}  // namespace

int64_t stem_shared_bytes(const Problem& p, const StemTile& tile) {
  return sizes_of(p, tile).bytes;
}

std::string stem_refuses(const Problem& p) {
  if (p.c > 4) return sentence("the stem's kernel expands pixels to 4 channels, got ", p.c);
  if (p.stride_w != 2)
    return sentence("the stem's kernel needs columns of stride 2, got ", p.stride_w);
  if (p.dilation_h != 1 || p.dilation_w != 1 || p.groups != 1 || p.shortcut_c)
    return "the stem's kernel has no groups, dilation or shortcut";
  if (p.k % 8 || p.k > 65535 * kStemChannels)
    return sentence("the stem's kernel has channels in multiples of 8, at most ",
                    65535 * kStemChannels, ", got ", p.k);
  if (p.r > 1024 || p.s > 1024 || p.stride_h > 1024 ||
      stem_shared_bytes(p, kStemTiles[kStemTileCount - 1]) > kMostShared)
    return sentence("the stem's kernel would need more than ", kMostShared,
                    " bytes of shared memory");
  return "";
}

StemChoice choose_stem(const Problem& p, const Device& device) {
  const int pool_h = pooled(out_h(p));
  StemChoice best{kStemTileCount - 1, pool_h};
  double least = clocks(p, best, device);
  for (int tile = 0; tile < kStemTileCount; ++tile) {
    if (stem_shared_bytes(p, kStemTiles[tile]) > kMostShared) continue;
    // Only heights that cut the image into even bands.
    for (int rows = pool_h; rows > 0;
         rows = rows > 1 ? ceil_div(pool_h, ceil_div(pool_h, rows - 1)) : 0) {
      const double cost = clocks(p, {tile, rows}, device);
      if (cost < least) best = {tile, rows}, least = cost;
    }
  }
  return best;
}

StemParams stem_params(const Problem& p, const StemChoice& choice, const StemOperands& o) {
  const StemTile& tile = kStemTiles[choice.tile];
  const Sizes s = sizes_of(p, tile);
  StemParams k{};
  k.problem = {p.n, p.h, p.w, p.c, p.k, p.r, p.s, p.stride_h, p.stride_w, p.pad_h, p.pad_w};
  k.layout = {int(s.chunks), int(s.positions),  int(s.raw),      int(s.raw_pitch),
              int(s.ring),   int(s.ring_pitch), int(s.ring_rows)};
  k.out_h = out_h(p);
  k.out_w = out_w(p);
  k.pool_h = pooled(k.out_h);
  k.pool_w = pooled(k.out_w);
  k.rows = choice.rows;
  k.bands = ceil_div(k.pool_h, k.rows);
  k.tiles_of_w = tiles_of_w(p, tile);
  k.items = p.n * k.bands * k.tiles_of_w;
  k.relu = o.relu;
  k.masks = p.s < 2 * k.layout.chunks;
  k.x = o.x;
  k.weight = o.weight;
  k.scale = o.scale;
  k.shift = o.shift;
  k.y = o.y;
  return k;
}

StemGrid stem_grid(const Problem& p, const StemChoice& choice, const Device& device) {
  const StemTile& tile = kStemTiles[choice.tile];
  const int channel_tiles = ceil_div(p.k, kStemChannels);
  const int at_once = std::max(1, resident(p, tile) * device.multiprocessors / channel_tiles);
  const int items = p.n * ceil_div(pooled(out_h(p)), choice.rows) * tiles_of_w(p, tile);
  return {std::min(at_once, items), channel_tiles, int(stem_shared_bytes(p, tile))};
}

}  // namespace resnet_fused::sm90
