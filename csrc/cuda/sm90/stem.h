// A net's stem on Hopper: convolution, scale and shift, ReLU and 3 x 3 max-pool of stride 2 and
// padding 1 in one kernel, by wgmma. sm80/stem.h serves what this one refuses.
//
// Rows of the image are expanded to four channels a pixel in shared memory, zeros for those that
// are not there and outside of the image. A chunk of 16 bytes then holds two pixels, and with a
// stride of 2 the window of the next output begins one chunk further. wgmma without swizzle reads
// 8 rows x 16 bytes of an operand from wherever they lie 16 bytes apart: those of eight
// neighbouring outputs are 128 bytes of the expanded row, and the next two taps of all of them the
// same, begun 16 bytes further. The matrix of windows, whose rows overlap, is never made.
//
//   M: 64 output channels, weights as [chunk][64][16 bytes]   N: a run of outputs in one row
//   K: chunk by chunk along each of r filter rows, as many as make an even number of chunks
//
// So an accumulator's registers are pairs of neighbouring outputs of one channel. A warpgroup
// computes the rows of a band from top to bottom; the maximum of three rows is one of registers, of
// three columns one more with the neighbour lane's. Nothing but the image goes through shared
// memory.
//
// Taps behind the window, in its last chunk, have zero weights, and 0 * NaN is NaN. A band that
// holds a number that is not finite is computed by mma.sync, which can mask them.
#pragma once

#include <string>

#include "cuda/sm90/plan.h"

struct CUstream_st;

namespace resnet_fused::sm90 {

constexpr int kStemChannels = 64, kStemThreads = 128, kStemPixelBytes = 8;
// Outputs of the convolution that are computed at a time, and blocks that share a multiprocessor.
struct StemTile {
  int columns, blocks_per_sm;
};
constexpr StemTile kStemTiles[] = {
    {112, 3},  // a whole row of an image of 224
    {64, 4},   // more and shorter bands for few images
};
constexpr int kStemTileCount = sizeof(kStemTiles) / sizeof(kStemTiles[0]);

// How the work is cut: pooled rows of a band.
struct StemChoice {
  int tile, rows;
};

// Where things lie in shared memory, offsets and sizes in bytes: the weights; rows of the image as
// they are in memory, for one expansion; the ring of expanded rows. The weights as they are in
// memory lie over the ring before it is used.
struct StemLayout {
  int chunks;     // of a filter row, even
  int positions;  // chunks of an expanded row
  int raw, raw_pitch;
  int ring, ring_pitch, ring_rows;
};

// The problem without what stem_refuses demands to be 1, or not there.
struct StemProblem {
  int n, h, w, c, k, r, s;
  int stride_h, stride_w, pad_h, pad_w;
};
struct StemParams {
  StemProblem problem;
  bool relu, masks;  // masks: there are taps behind the window
  StemLayout layout;
  int out_h, out_w, pool_h, pool_w;
  int rows, bands, tiles_of_w, items;  // of an image; all items
  const void *x, *weight;              // [n][h][w][c], [k][r][s][c], at multiples of 16 bytes
  const float *scale, *shift;          // [k]
  void* y;                             // [n][pool_h][pool_w][k], at a multiple of 16 bytes
};
struct StemOperands {
  bool bfloat16, relu;
  const void *x, *weight;
  const float *scale, *shift;
  void* y;
};

// A run of pooled rows, and of columns from the pair of the convolution's that comes first. The
// first pair of all but the first run only lends its right column to the next.
struct StemBand {
  int image, pair, row, end;
};
RF_HD StemBand stem_band(const StemParams& p, int columns, int item) {
  const int across = item / p.tiles_of_w, image = across / p.bands;
  const int row = (across - image * p.bands) * p.rows;
  return {image, (item - across * p.tiles_of_w) * (columns / 2 - 1), row,
          row + p.rows < p.pool_h ? row + p.rows : p.pool_h};
}

// ---- stem.cpp: host only, the same on a machine without a GPU ----
// Empty where the kernel serves this convolution with the pool behind it, else one sentence. Of
// what the sm_80 kernel serves.
std::string stem_refuses(const Problem& p);
// By a model; on an H100 within 8% of the fastest cut of ResNet's stem at batch 1, 8, 32 and 128.
StemChoice choose_stem(const Problem& p, const Device& device);
// Bytes of shared memory; more than int holds for the absurd.
int64_t stem_shared_bytes(const Problem& p, const StemTile& tile);
StemParams stem_params(const Problem& p, const StemChoice& choice, const StemOperands& o);
// Those that run at a time, or fewer.
struct StemGrid {
  int blocks, channel_tiles, shared_bytes;
};
StemGrid stem_grid(const Problem& p, const StemChoice& choice, const Device& device);

// ---- launch_stem.cpp ----
// On the current device, of capability 9.0. Empty, or why the kernel did not start. Safe in CUDA
// graph capture.
std::string launch_stem(const Problem& p, const StemOperands& o, const Device& device,
                        CUstream_st* stream);

// ---- kernels_stem.cu ----
const void* stem_bfloat16(int tile);
const void* stem_float16(int tile);

}  // namespace resnet_fused::sm90
