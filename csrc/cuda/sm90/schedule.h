// Tiles of the sm_90a kernel, and the order in which they and a convolution's reduction are walked.
//
// As a matrix product: rows (or columns) are the N * P * Q output pixels, columns (or rows) the K
// channels. The reduction goes tap by tap, a tap in chunks of `chunk` channels; a 1 x 1 shortcut
// of another tensor follows as further chunks of the same sum.
#pragma once

#include <cstdint>

#include "cuda/problem.h"

namespace resnet_fused::sm90 {

using cuda::ceil_div;
using cuda::Problem;

// channels_on_m: which side of wgmma the output channels take. M comes in 64s, so C = 64 layers put
// channels there and 256 pixels on N: then 64 + 256 rows are read from shared memory for
// 64 x 256 products, where 64 pixels and 64 channels would read 128 rows for a quarter of them.
enum Sharing {
  kPingPong,  // two warpgroups take turns, a tile each: one's epilogue runs under the other's sums
  kSplitM,    // two warpgroups share a tile, each half of its M
};
struct Tile {
  bool channels_on_m;
  int m_blocks;  // of 64 rows, per warpgroup
  int n;
  int chunk;  // elements of the reduction per stage
  int stages;
  Sharing sharing;
  int consumers;  // warpgroups; 1: two blocks share an SM
};
// Only where a block has one warpgroup that sums: it meets those of the other blocks.
RF_HD constexpr bool splits_reduction(const Tile& t) { return t.consumers == 1; }
RF_HD constexpr int tile_m(const Tile& t) {
  return 64 * t.m_blocks * (t.sharing == kSplitM ? 2 : 1);
}
RF_HD constexpr int tile_pixels(const Tile& t) { return t.channels_on_m ? t.n : tile_m(t); }
RF_HD constexpr int tile_channels(const Tile& t) { return t.channels_on_m ? tile_m(t) : t.n; }
RF_HD constexpr int stage_bytes(const Tile& t) { return (tile_m(t) + t.n) * t.chunk * 2; }
// Of two warpgroups each puts its part of the outputs where TMA takes it from (staged_store.cuh).
RF_HD constexpr bool stages_outputs(const Tile& t) { return t.consumers == 2; }
RF_HD constexpr int place_pixels(const Tile& t) { return t.channels_on_m ? t.n : 64 * t.m_blocks; }
RF_HD constexpr int place_bytes(const Tile& t) {
  return stages_outputs(t) ? 64 * t.m_blocks * t.n * 2 : 0;
}

// ---- the reduction ----
struct Reduction {
  int kernel_w, main_chunks, main_steps, steps, chunk;  // steps: all, the shortcut's included
};
RF_HD Reduction reduction_of(const Problem& p, int chunk) {
  Reduction k;
  k.kernel_w = p.s;
  k.chunk = chunk;
  k.main_chunks = ceil_div(p.c, chunk);
  k.main_steps = p.r * p.s * k.main_chunks;
  k.steps = k.main_steps + ceil_div(p.shortcut_c, chunk);
  return k;
}
struct Step {
  int c, s, r;  // first channel, filter column, filter row
  bool shortcut;
};
RF_HD Step step_at(const Reduction& k, int i) {
  if (i >= k.main_steps) return {(i - k.main_steps) * k.chunk, 0, 0, true};
  const int tap = i / k.main_chunks, r = tap / k.kernel_w;
  return {(i - tap * k.main_chunks) * k.chunk, tap - r * k.kernel_w, r, false};
}
// The step after step number i, which `step` is.
RF_HD void step_next(const Reduction& k, int i, Step& step) {
  step.c += k.chunk;
  if (step.shortcut) return;
  if (i + 1 == k.main_steps) {
    step = {0, 0, 0, true};
  } else if (step.c == k.main_chunks * k.chunk) {
    step.c = 0;
    if (++step.s == k.kernel_w) {
      step.s = 0;
      ++step.r;
    }
  }
}

// ---- tiles ----
struct Schedule {
  int pixel_tiles, channel_tiles, splits, steps;
  int pixels, p, q, k;
};
RF_HD Schedule schedule_of(const Problem& p, const Tile& t, int splits) {
  Schedule s;
  s.p = out_h(p);
  s.q = out_w(p);
  s.pixels = p.n * s.p * s.q;
  s.k = p.k;
  s.pixel_tiles = ceil_div(s.pixels, tile_pixels(t));
  s.channel_tiles = ceil_div(p.k, tile_channels(t));
  s.steps = reduction_of(p, t.chunk).steps;
  s.splits = splits < 1 ? 1 : splits > s.steps ? s.steps : splits;
  return s;
}
RF_HD int tiles_of(const Schedule& s) { return s.pixel_tiles * s.channel_tiles; }
RF_HD int work_items(const Schedule& s) { return tiles_of(s) * s.splits; }
struct Work {
  int pixel, channel;  // the tile's first
  int begin, end;      // steps of the reduction, never empty
  int split;
};
// The splits of a tile are neighbours, a cluster; then the channel tile is the fastest index:
// neighbours in time share activations in L2.
RF_HD Work work_at(const Schedule& s, int tile_pixels, int tile_channels, int index) {
  Work w;
  const int tile = index / s.splits, pixel_tile = tile / s.channel_tiles;
  w.split = index - tile * s.splits;
  w.pixel = pixel_tile * tile_pixels;
  w.channel = (tile - pixel_tile * s.channel_tiles) * tile_channels;
  w.begin = int(int64_t(w.split) * s.steps / s.splits);
  w.end = int(int64_t(w.split + 1) * s.steps / s.splits);
  return w;
}
// Where TMA starts for an output pixel: its first tap, in input coordinates.
struct Coordinate {
  int w, h, n;
};
RF_HD Coordinate first_tap(const Schedule& s, int pixel, int stride_h, int stride_w, int pad_h,
                           int pad_w) {
  const int n = pixel / (s.p * s.q), rest = pixel - n * (s.p * s.q);
  const int p = rest / s.q, q = rest - p * s.q;
  return {q * stride_w - pad_w, p * stride_h - pad_h, n};
}

}  // namespace resnet_fused::sm90
