// The 7 x 7 stride-2 convolution of few channels that begins a ResNet: Winograd along its rows.
//
// Rows 2r + ky of the input meet tap ky in output row r, so even taps see every second row and odd
// taps the rows between: two convolutions of stride 1, one of 4 taps and one of 3. Four output rows
// of them are F(4, 4) and F(4, 3), one-dimensional, over the 7 even and the 6 odd of 13 input rows:
//
//   Y = A^T [ (G_even w_even) . (B_even^T x_even) + (G_odd w_odd) . (B_odd^T x_odd) ]
//
// The points of the odd rows (0, +-1, +-1/2, infinity) are among those of the even rows, which have
// 2 besides. A point's column of A^T does not depend on the number of taps, so both products of a
// point add up before the output transform: 7 sums, from 13 transformed rows where a direct
// convolution multiplies 28.
//
// Along a row nothing is transformed: kernel columns and channels are the reduction of a matrix
// product that reads a transformed row in place, because the window of the next output pixel
// begins stride_w * channels floats further on. Weights are transformed once, in float64:
//
//   packed[panel][row][kernel column, channel][32]     panel = 32 output channels
//   rows[row][column, channel]                         zeros where the padding is
//
// Both have the 13 rows in the order in which the points use them: the even and the odd row of each
// of the 6 shared points, then the even row of the point 2.
//
// A block of output pixels, a register tile wide, goes through all 7 points before the next one:
// its sums, 12.5 KB, stay in L1. Measured on one core of Zen 4 at 3.65 GHz, 3 x 224 x 224 to 64
// channels, float32: 1.14 ms, of which the multiplications take 1.00 (0.93 at the core's peak) and
// both transforms 0.10. Neither a step known at compile time nor prefetching the weights gains 1%.
// The relative L2 error is 5e-7 with 3 channels (direct: 1.6e-7) and at most 1.1e-6 with more.
#pragma once

#include <cstdint>

#include "conv.h"
#include "cpu/cut.h"
#include "cpu/direct.h"
#include "cpu/pool.h"

namespace resnet_fused {

constexpr int64_t kStemKernel = 7, kStemStride = 2;  // of the rows; the columns' are free
constexpr int64_t kStemRows = 13;                    // input rows of a strip, transformed rows
constexpr int64_t kStemOut = 4;                      // output rows of a strip
constexpr int kStemPoints = 7, kStemShared = 6;      // the shared points come first
constexpr int kStemInfinity = 5;
constexpr double kStemPoint[kStemPoints] = {0, 1, -1, 0.5, -0.5, 0 /* infinity */, 2};
constexpr int64_t kStemMaxCols = 16;  // output columns of a register tile, at most

inline int64_t stem_reduction(const ConvShape& s) { return s.kernel_w * s.in_channels; }
inline int64_t stem_strips(const ConvShape& s) { return ceil_div(s.out_h(), kStemOut); }

// One job: strips of 4 output rows, counted through all images, and a range of panels.
struct StemJob {
  int64_t strip_begin, strip_end;
  int64_t panel_begin, panel_end;
  // y is the max-pool of the output (pool.h). Every pooled row is then complete but the first one
  // of a job that begins within an image: it lacks the last row of the strip above.
  bool pool;
  // Where that row goes for the job below, pooled along the columns: [pooled column][out_channels];
  // null where the job ends with an image.
  float* edge;
};

// Where the pieces of a job's scratch memory lie, in floats.
struct StemScratch {
  int64_t lead;    // from a row's begin to its first column: aligns the image behind the padding
  int64_t stride;  // between transformed rows
  int64_t sums;    // of one register tile: [point][column][32]
  int64_t carry;   // a row like StemJob::edge, between the strips of a job
  int64_t total;

  explicit StemScratch(const ConvShape& s) {
    const int64_t padding = s.pad_w * s.in_channels, step = s.stride_w * s.in_channels;
    lead = ceil_div(padding, kChunk) * kChunk - padding;
    const int64_t image = padding + ceil_div(s.in_w * s.in_channels, kChunk) * kChunk;
    const int64_t windows = (s.out_w() - 1) * step + stem_reduction(s);
    // An odd number of chunks, so that the rows lie in different cache sets.
    stride = (ceil_div(lead + (image > windows ? image : windows), kChunk) | 1) * kChunk;
    sums = kStemRows * stride;
    carry = sums + kStemPoints * kStemMaxCols * kPanel;
    total = carry + pooled(s.out_w()) * s.out_channels;
  }
};

// How a convolution with at least one output pixel is cut into jobs; rows of the cut are strips.
Cut stem_cut(const ConvShape& shape, int64_t threads);
// weight: [out_channels][in_channels][7][kernel_w], dense.
void stem_pack(const ConvShape& shape, const float* weight, float* packed);

}  // namespace resnet_fused
