// Implicit-GEMM convolution: how the work is cut, shared by the driver and the kernels.
//
// The convolution is a matrix product: rows are output pixels, columns are output channels, and the
// reduction runs over (kernel row, kernel column, input channel). Weights are packed once as
//
//   packed[group][panel][reduction][32]       panel = 32 output channels, the last one padded with 0
//
// and each job gathers its input rows into the cache in the order in which the kernel reads them:
//
//   rows[chunk][row][16]                      chunk = 16 steps of the reduction
//
// so that a register tile walks both with constant offsets. Neither layout depends on the
// instruction set: packed weights stay valid whichever kernel runs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv.h"

namespace resnet_fused {

constexpr int64_t kPanel = 32;
constexpr int64_t kChunk = 16;
constexpr int64_t kMaxSlice = 512;  // longest part of the reduction that is gathered at once

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t panels_of(int64_t group_out) { return ceil_div(group_out, kPanel); }

// How one convolution is cut into jobs: `rows` output pixels by `panels` panels of one group each.
struct DirectTiles {
  int64_t rows;
  int64_t panels;
  int64_t slice;  // steps of the reduction gathered at once, a multiple of kChunk
};

// One job: output pixels [row_begin, row_end), panels [panel_begin, panel_end) of `group`.
struct DirectJob {
  int64_t row_begin, row_end;
  int64_t group;
  int64_t panel_begin, panel_end;
  int64_t slice;
};

// Floats of scratch memory that a job needs.
inline int64_t direct_scratch(const DirectTiles& tiles) {
  return tiles.rows * (tiles.slice + tiles.panels * kPanel);
}

DirectTiles direct_tiles(const ConvShape& shape, int64_t threads);
void direct_conv(const ConvArgs& args);
// weight: [out_channels][group_in][kernel_h][kernel_w], dense.
void direct_pack(const ConvShape& shape, const float* weight, float* packed);

}  // namespace resnet_fused
