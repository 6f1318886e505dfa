// Fused Winograd convolution F(m x m, 3 x 3), stride 1: how the work is cut, shared by driver and
// kernels.
//
// An output tile of m x m pixels is computed from its (m + 2) x (m + 2) input window:
//
//   Y = A^T [ (G w G^T) . (B^T x B) ] A          summed over the input channels
//
// which costs (m + 2)^2 multiplications a channel pair instead of 9 m^2: 2.25 times less for m = 2,
// 4 times less for m = 4. For each of the (m + 2)^2 points the sum over channels is a matrix
// product, tiles by output channels, and runs on the register tile of the implicit GEMM.
//
// Weights are transformed once, in float64, and packed in the order in which they are read:
//
//   packed[panel][point][in_channel][32]
//
// A job takes a block of tiles through all three steps while everything stays in its core's L2:
//
//   values[point][chunk][tile][16]   transformed windows, all input channels
//   sums[point][tile][32]            products of one panel, output before the next one's
//
// Measured within ResNet-18, one image, 2 cores with AVX-512 and 2 MiB of L2 each: turning each
// panel into output before the next, and passing large weights through one core only, took a layer
// of stage 4 from 1.62 to 1.18 ms and of stage 3 from 1.00 to 0.75.
#pragma once

#include "conv.h"
#include "cpu/direct.h"

namespace resnet_fused {

// One job: tiles [tile_begin, tile_end) in (image, tile row, tile column) order, panels
// [panel_begin, panel_end).
struct WinogradJob {
  int64_t tile_begin, tile_end;
  int64_t panel_begin, panel_end;
  bool values_ready;  // the scratch memory still holds the transformed windows of these tiles
};

constexpr int64_t winograd_points(int64_t m) { return (m + 2) * (m + 2); }

// Distances between the points' matrices, in floats. The odd chunk keeps the points of one tile out
// of the same cache sets.
inline int64_t values_stride(const ConvShape& shape, int64_t tiles) {
  return ceil_div(shape.in_channels, kChunk) * tiles * kChunk + kChunk;
}
inline int64_t sums_stride(int64_t tiles) { return tiles * kPanel + kChunk; }

// Floats of scratch memory that a job of `tiles` tiles needs.
inline int64_t winograd_scratch(const ConvShape& shape, int64_t m, int64_t tiles) {
  return winograd_points(m) * (values_stride(shape, tiles) + sums_stride(tiles));
}

// How a convolution with at least one output pixel is cut into jobs for `threads` threads.
Cut winograd_cut(const ConvShape& shape, int64_t m, int64_t threads);
// weight: [out_channels][in_channels][3][3], dense.
void winograd_pack(const ConvShape& shape, int64_t m, const float* weight, float* packed);

}  // namespace resnet_fused
