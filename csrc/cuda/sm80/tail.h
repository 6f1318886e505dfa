// The tail of a bottleneck block in one kernel: a convolution and the 1 x 1 convolution behind it.
//
//   y = act(conv1x1(act(conv(x) * scale + shift)) * scale + shift + residual)
//
// A block computes a tile of pixels: first all channels of the map between the two convolutions,
// then, from those, slices of the output's channels one after the other. The map between never
// leaves the registers.
#pragma once

#include "cuda/sm80/plan.h"

struct CUstream_st;

namespace resnet_fused::sm80 {

// first.k: channels of the map between; k: of the output.
struct TailProblem {
  Problem first;
  int k;
};

// Warps take whole rows of channels: then a thread's sums of the first convolution, rounded, are
// its operands of the second.
constexpr NamedTile kTailTiles[] = {
    {"64", {128, 64, 4, 4, 1, 4}, 3},
    {"128", {128, 128, 4, 8, 1, 4}, 1},
};
constexpr int kTailTileCount = sizeof(kTailTiles) / sizeof(kTailTiles[0]);
constexpr int kMostBetween = kTailTiles[kTailTileCount - 1].tile.channels;

// A slice: 64 output channels by all channels between, in panels of 64, whose rows have 128 bytes.
constexpr int kSliceChannels = 64, kPanelChannels = 64;
RF_HD constexpr Tile slice_tile(const Tile& first) {
  return {first.pixels, kSliceChannels, 8, first.warps_m, 1, 1};
}
RF_HD constexpr int slice_bytes(const Tile& first) { return kSliceChannels * first.channels * 2; }
// Two slices of weights and the epilogue's patches lie where the ring was.
RF_HD constexpr int tail_patches_at(const Tile& first) { return 2 * slice_bytes(first); }
RF_HD constexpr int tail_shared_bytes(const Tile& first) {
  const int ring = first.stages * stage_bytes(first);
  const int patches = first.warps_m * 16 * patch_pitch(slice_tile(first)) * 4;
  const int slices = tail_patches_at(first) + patches;
  return ring > slices ? ring : slices;
}

struct TailParams {
  KernelParams first;  // without y
  KernelParams last;   // without x
};
struct TailOperands {
  bool relu, last_relu;
  const void *x, *weight;
  const float *scale, *shift;            // [first.k]
  const void* last_weight;               // [k][first.k]
  const float *last_scale, *last_shift;  // [k]
  const void* residual;                  // [pixels][k] or null
  void* y;                               // [pixels][k]
};

// ---- tail.cpp: host only, the same on a machine without a GPU ----
// Empty where the kernel serves these convolutions, else one sentence.
std::string tail_refuses(const TailProblem& p);
// A number of kTailTiles: the least that holds all channels between.
int tail_tile(const TailProblem& p);
TailParams tail_params(const TailProblem& p, const TailOperands& o);
int tail_blocks(const TailProblem& p);

// ---- launch_tail.cpp ----
// On the current device. Empty, or why the kernel did not start. Safe in CUDA graph capture.
std::string launch_tail(const TailProblem& p, Type type, const TailOperands& o,
                        CUstream_st* stream);

// ---- kernels_tail.cu ----
const void* tail_bfloat16(int tile);
const void* tail_float16(int tile);

}  // namespace resnet_fused::sm80
