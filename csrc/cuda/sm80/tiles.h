// The tiles of the sm_80 kernel that are compiled, and how a grid of them covers a convolution.
//
// As a matrix product: rows are the N * P * Q output pixels, columns the K channels of one group,
// and the reduction is the flattened (r, s, c), which is how both operands lie in memory. A 1 x 1
// shortcut of another tensor follows as further steps of the same sum.
#pragma once

#include "cuda/problem.h"

namespace resnet_fused::sm80 {

using cuda::ceil_div;
using cuda::Problem;

// How two elements are multiplied. kTensor: float16 or bfloat16 on tensor cores; kTf32: float32
// rounded to 11 bits on tensor cores; kFloat32: float32 as it is, by the ordinary FMA units.
enum class Math { kTensor, kTf32, kFloat32 };

// `pixels` x `channels` outputs a block, in `warps_m` x `warps_n` warps; `chunks` 16-byte chunks of
// the reduction per stage; `stages` of them in shared memory at a time.
struct Tile {
  int pixels, channels, chunks, warps_m, warps_n, stages;
};
RF_HD constexpr int threads(const Tile& t) { return 32 * t.warps_m * t.warps_n; }
RF_HD constexpr int stage_bytes(const Tile& t) { return (t.pixels + t.channels) * t.chunks * 16; }
// The epilogue turns 16 rows of each warp through the same memory, padded against bank conflicts.
RF_HD constexpr int patch_pitch(const Tile& t) { return t.channels / t.warps_n + 8; }
RF_HD constexpr int shared_bytes(const Tile& t) {
  const int ring = t.stages * stage_bytes(t);
  const int patches = t.warps_m * t.warps_n * 16 * patch_pitch(t) * 4;
  return (ring > patches ? ring : patches) + 16;  // and a word for split-K
}

struct NamedTile {
  const char* name;
  Tile tile;
  int blocks_per_sm;  // that registers and shared memory must leave room for
};
// Sizes that the prototype's registers and instruction counts allowed, for Ampere. On an H100 all
// but any64x64 were timed on ResNet's convolutions in bfloat16
// (benchmarks/results/gpu_h100_layers.json): each was the fastest of them for some, and one of
// sm90's faster for all. 128 x 128 with chunks of 128 bytes is left out: it spills on sm_100.
constexpr NamedTile kTiles[] = {
    {"128x128", {128, 128, 4, 2, 4, 4}, 2},
    {"128x64", {128, 64, 4, 2, 2, 4}, 2},
    {"64x64", {64, 64, 4, 2, 2, 4}, 4},
    {"64x64k64", {64, 64, 8, 2, 2, 3}, 3},  // half the barriers, for long reductions
    {"64x32", {64, 32, 4, 2, 1, 4}, 6},     // where 64 x 64 would leave SMs idle
    {"any64x64", {64, 64, 4, 2, 2, 3}, 3},  // any channels, loaded element by element
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);
constexpr int kAnyTile = kTileCount - 1;
// The FMA path keeps whole rows of operands in registers besides its sums: small tiles only. And
// 128 x 128 with a shortcut spills on sm_80.
RF_HD constexpr bool has_tile(Math math, int tile, bool shortcut) {
  return math == Math::kFloat32 ? tile > 1 : !(shortcut && tile == 0);
}

// ---- the reduction and the grid ----
struct Schedule {
  int pixel_tiles, channel_tiles, splits;  // channel tiles: of all groups
  int main_steps, steps;                   // steps: all, the shortcut's included
};
// element_bytes: 2 or 4.
RF_HD Schedule schedule_of(const Problem& p, const Tile& t, int element_bytes, int splits) {
  const int step = t.chunks * 16 / element_bytes;
  Schedule s;
  s.pixel_tiles = ceil_div(pixels(p), t.pixels);
  s.channel_tiles = p.groups * ceil_div(group_out(p), t.channels);
  s.main_steps = ceil_div(p.r * p.s * group_in(p), step);
  s.steps = s.main_steps + ceil_div(p.shortcut_c, step);
  s.splits = splits < 1 ? 1 : splits > s.steps ? s.steps : splits;
  return s;
}
RF_HD int tiles_of(const Schedule& s) { return s.pixel_tiles * s.channel_tiles; }

// What the kernel is called with.
struct KernelParams {
  Problem problem;
  Schedule schedule;
  int out_h, out_w;
  bool relu;
  const void *x, *weight, *shortcut_x, *shortcut_weight;
  const float *scale, *shift;                    // [K]
  const float *shortcut_scale, *shortcut_shift;  // [K], with a shortcut
  const void* residual;                          // [pixels][K] or null
  void* y;                                       // [pixels][K]
  float* partial;     // split-K: splits * tiles * tile.pixels * tile.channels floats
  unsigned* tickets;  // split-K: one per tile; zero before a launch and after it
};

}  // namespace resnet_fused::sm80
