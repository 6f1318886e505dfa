// Fused Winograd convolution, 3 x 3 kernels of stride 1 or 2: how the work is cut, shared by driver
// and kernels. winograd_points.h has the algorithms in one dimension.
//
// An output tile of m x m pixels is computed from its window of the input:
//
//   Y = A^T [ (G w G^T) . (B^T x B) ] A          summed over the input channels
//
// which costs points^2 multiplications a channel pair instead of 9 m^2: 4 times less for F(4x4),
// 4.6 for F(5x5), 2.25 for F(2x2); at stride 2 1.8 times less for m = 4, 1.4 for m = 2. For each of
// the points^2 points the sum over channels is a matrix product, tiles by output channels, and runs
// on the register tile of gemm_body.h.
//
// Weights are transformed once, in float64, and packed in the order in which they are read:
//
//   packed[panel][point][word][32]    word: one input channel, or two in bfloat16
//
// Plan "winograd4_raw" keeps the kernels as they are and transforms them in float32 when they are
// used (winograd_raw_body.h):
//
//   packed[panel][input channel][tap][32]
//
// A job takes a block of tiles through all three steps while everything stays in its core's caches:
//
//   values[point][chunk][tile][16 words]   transformed windows, all input channels
//   sums[point][tile][32]                  products of one panel, output before the next one's
//
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

// One algorithm for both dimensions, as the drivers see it.
struct WinogradTiling {
  int64_t out;     // output pixels of a tile's side
  int64_t points;  // products in one dimension
  int64_t stride;  // of the convolutions that it computes

  int64_t tiles(const ConvShape& shape) const {
    return shape.batch * ceil_div(shape.out_h(), out) * ceil_div(shape.out_w(), out);
  }
};

// Words of a tile's transformed window, and distances between the points' matrices, in floats. The
// odd chunk keeps the points of one tile out of the same cache sets.
inline int64_t window_words(const ConvShape& shape, int64_t pack) {
  return ceil_div(shape.in_channels, pack);
}
inline int64_t values_stride(const ConvShape& shape, int64_t pack, int64_t tiles) {
  return ceil_div(window_words(shape, pack), kChunk) * tiles * kChunk + kChunk;
}
inline int64_t sums_stride(int64_t tiles) { return tiles * kPanel + kChunk; }

constexpr int64_t kKernelTaps = 9;  // 3x3

// How a convolution with at least one output pixel is cut into jobs for `threads` threads. pack:
// elements of the reduction in a word; raw: weights are transformed when they are used; lanes: of
// the kernels' vectors.
Cut winograd_cut(const ConvShape& shape, WinogradTiling tiling, int64_t pack, bool raw,
                 int64_t threads, int64_t lanes);

// weight: [out_channels][in_channels][3][3], dense; packed: the layout of a Winograd plan.
void winograd_pack(Plan plan, const ConvShape& shape, const float* weight, void* packed);

}  // namespace resnet_fused
