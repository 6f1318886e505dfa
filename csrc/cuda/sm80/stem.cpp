// What the stem's kernel serves, with which tile, and where things lie; without the CUDA runtime.
#include "cuda/sm80/stem.h"

#include <algorithm>
#include <cstdint>

#include "check.h"

namespace resnet_fused::sm80 {
namespace {

using cuda::pooled;
using cuda::up_to;

// Of a problem that may yet be refused: what is absurd must not overflow.
struct Sizes {
  int64_t shift, lead, segments, steps, pitch, patch_rows, weight_pitch;
  double elements;
};
Sizes sizes_of(const Problem& p, const StemTile& tile) {
  const int64_t c = p.c, before = (int64_t(p.stride_w) + p.pad_w) * c;
  Sizes s;
  s.shift = (8 - before % 8) % 8;  // from a multiple of 8 elements to a tile's first window
  s.lead = s.shift & 1;
  s.segments = up_to(s.lead + p.s * c, 8) / 8;
  s.steps = (p.r * s.segments + 1) / 2;
  s.pitch = up_to(s.shift - s.lead + (kConvColumns - 1) * p.stride_w * c + 8 * s.segments, 8);
  s.patch_rows = int64_t(conv_rows(tile) - 1) * p.stride_h + p.r;
  s.weight_pitch = 8 * (2 * s.steps + 1);  // odd, in units of 16 bytes, for ldmatrix
  s.elements = double(s.patch_rows) * double(s.pitch) + double(kStemChannels * s.weight_pitch) +
               conv_pixels(tile) * kOutputPitch;
  return s;
}
bool fits(const Problem& p, const StemTile& tile) {
  return stem_shared_bytes(p, tile) <= kMostStemShared;
}
int tiles_of(const Problem& p, const StemTile& tile) {
  return p.n * ceil_div(pooled(out_h(p)), tile.rows) * ceil_div(pooled(out_w(p)), kPoolColumns);
}

// Clocks of the busiest multiprocessor, modelled for Ampere. On an H100 the kernel was timed
// (docs/cuda_stem.md), but this is fitted to no measurement.
double clocks(const Problem& p, const StemTile& tile, const Device& device) {
  constexpr double kMacsPerClock = 1024;   // documented for sm_80
  constexpr double kSharedPerClock = 128;  // bytes, documented
  constexpr double kTileClocks = 400;      // assumed: barriers and the wait for a patch
  const Sizes s = sizes_of(p, tile);
  const int64_t all = int64_t(tiles_of(p, tile)) * ceil_div(p.k, kStemChannels);
  const int64_t each = (all + device.multiprocessors - 1) / device.multiprocessors;
  const double multiply = 16.0 * tile.products * tile.warps_m * kStemChannels * 16 * s.steps;
  const double moved = 2.0 * (s.patch_rows * s.pitch + 4.0 * conv_pixels(tile) * kStemChannels);
  return each * (multiply / kMacsPerClock + moved / kSharedPerClock + kTileClocks) +
         2.0 * kStemChannels * s.weight_pitch;
}

}  // namespace

int64_t stem_shared_bytes(const Problem& p, const StemTile& tile) {
  return int64_t(std::min(2 * sizes_of(p, tile).elements, 1e18));
}

std::string stem_refuses(const Problem& p) {
  const std::string why = refuses(p);
  if (!why.empty()) return why;
  if (p.groups != 1 || p.dilation_h != 1 || p.dilation_w != 1 || p.shortcut_c)
    return "its kernel with the max-pool has no groups, dilation or shortcut";
  if (p.k % 8)
    return sentence("its kernel with the max-pool needs output channels in multiples of 8, got ",
                    p.k);
  if (int64_t(p.stride_w) * p.c % 2)
    return sentence(
        "its kernel with the max-pool needs an even stride or number of channels, got stride ",
        p.stride_w, " and ", p.c, " channels");
  if ((int64_t(p.w) + 2 * int64_t(p.pad_w) + 64) * p.c > INT32_MAX) return kFar;
  if (p.k > 65535 * kStemChannels)
    return sentence("its kernel with the max-pool has at most ", 65535 * kStemChannels,
                    " output channels, got ", p.k);
  const StemTile& least = kStemTiles[kStemTileCount - 1];
  if (!fits(p, least))
    return sentence("its kernel with the max-pool would need ", stem_shared_bytes(p, least),
                    " bytes of shared memory, more than ", kMostStemShared);
  return "";
}

int choose_stem(const Problem& p, const Device& device) {
  int best = kStemTileCount - 1;
  for (int i = 0; i < kStemTileCount; ++i)
    if (fits(p, kStemTiles[i]) &&
        clocks(p, kStemTiles[i], device) < clocks(p, kStemTiles[best], device))
      best = i;
  return best;
}

StemParams stem_params(const Problem& p, const StemTile& tile, const StemOperands& o) {
  const Sizes s = sizes_of(p, tile);
  const int64_t row = int64_t(p.w) * p.c;
  StemParams k{};
  k.problem = p;
  k.layout.lead = int(s.lead);
  k.layout.first = int(s.shift - s.lead);
  k.layout.segments = int(s.segments);
  k.layout.steps = int(s.steps);
  k.layout.pitch = int(s.pitch);
  k.layout.patch_rows = int(s.patch_rows);
  k.layout.granule = row % 8 == 0 ? 8 : row % 2 == 0 ? 2 : 1;
  k.layout.weight_pitch = int(s.weight_pitch);
  k.out_h = out_h(p);
  k.out_w = out_w(p);
  k.pool_h = pooled(k.out_h);
  k.pool_w = pooled(k.out_w);
  k.tiles_of_h = ceil_div(k.pool_h, tile.rows);
  k.tiles_of_w = ceil_div(k.pool_w, kPoolColumns);
  k.tiles = tiles_of(p, tile);
  k.relu = o.relu;
  k.x = o.x;
  k.weight = o.weight;
  k.scale = o.scale;
  k.shift = o.shift;
  k.y = o.y;
  return k;
}

StemGrid stem_grid(const Problem& p, const StemTile& tile, const Device& device) {
  const int bytes = int(stem_shared_bytes(p, tile)), channel_tiles = ceil_div(p.k, kStemChannels);
  const int resident =
      std::max(1, std::min(tile.blocks_per_sm, device.shared_bytes / (bytes + 1024)));
  const int at_once = std::max(1, resident * device.multiprocessors / channel_tiles);
  return {std::min(at_once, tiles_of(p, tile)), channel_tiles, threads(tile), bytes};
}

}  // namespace resnet_fused::sm80
