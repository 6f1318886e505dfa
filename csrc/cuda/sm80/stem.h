// A net's stem in one kernel: convolution, scale and shift, ReLU, 3 x 3 max-pool of stride 2 and
// padding 1. The convolution's output, four times the pooled one, never goes to memory.
//
// A block computes tiles of `rows` x 8 pooled outputs of 64 channels, one after the other, with the
// same weights. A tile needs (2 rows + 1) x 17 outputs of the convolution and so a patch of the
// image, which lies in shared memory as it does in global memory, zero outside of the image.
//
// The reduction follows the patch's rows. A window is s * c elements that lie side by side in each
// of r rows; cut into segments of 8 elements, two of which are one step of the tensor cores. What a
// segment holds besides the window is masked to zero on its way to the registers: zero weights
// would not do, as 0 * NaN is NaN.
//
// Tensor cores take pairs of elements, which must not straddle words. With an odd number of
// channels and an odd padding they would: windows begin at odd elements of the image's row. A
// segment then begins one element earlier (`lead`), so that rows can be copied as they are, 16
// bytes at a time where the image's rows allow it.
#pragma once

#include "cuda/sm80/plan.h"

struct CUstream_st;

namespace resnet_fused::sm80 {

constexpr int kPoolColumns = 8;  // of a tile: windows lie alike in the patches of all tiles
constexpr int kStemChannels = 64;
constexpr int kConvColumns = 2 * kPoolColumns + 1;
constexpr int kMostStemShared = 99 << 10;  // what sm_86 and sm_89 give a block, the least of all
constexpr int kOutputPitch = kStemChannels + 8;  // elements; no bank twice in a fragment's store

// A warp has `products` x (8 / warps_n) products of 16 pixels by 8 channels.
struct StemTile {
  int rows, products, warps_m, warps_n, blocks_per_sm;
};
RF_HD constexpr int threads(const StemTile& t) { return 32 * t.warps_m * t.warps_n; }
RF_HD constexpr int conv_rows(const StemTile& t) { return 2 * t.rows + 1; }
RF_HD constexpr int conv_pixels(const StemTile& t) { return conv_rows(t) * kConvColumns; }

// Fragments of pixels cost an address, a load and a mask for each word: warps of the large tile
// take all channels, so that each word serves 8 products.
constexpr StemTile kStemTiles[] = {
    {8, 5, 4, 1, 2},
    {4, 5, 2, 2, 3},  // twice as many blocks where 8 rows would leave multiprocessors idle
};
constexpr int kStemTileCount = sizeof(kStemTiles) / sizeof(kStemTiles[0]);

// Where everything lies in shared memory, in elements of 2 bytes: the patch, [64] rows of weights,
// the convolution's outputs.
struct StemLayout {
  int lead;        // elements of a segment before the window, 0 or 1
  int first;       // where in a patch's row the segments of its first window begin
  int segments;    // of a window's row
  int steps;       // two segments each
  int pitch;       // of the patch
  int patch_rows;  // of the patch
  int granule;     // elements that are copied at a time: 8, 2 or 1
  int weight_pitch;
};

struct StemParams {
  Problem problem;
  StemLayout layout;
  int out_h, out_w;                   // of the convolution
  int pool_h, pool_w;                 // of the output
  int tiles, tiles_of_h, tiles_of_w;  // of all images; of one
  bool relu;
  const void *x, *weight;      // [n][h][w][c], at a multiple of 16 bytes; [k][r][s][c]
  const float *scale, *shift;  // [k]
  void* y;                     // [n][pool_h][pool_w][k], at a multiple of 16 bytes
};
struct StemOperands {
  bool relu;
  const void *x, *weight;
  const float *scale, *shift;
  void* y;
};

// ---- stem.cpp: host only, the same on a machine without a GPU ----
// Empty where the kernel serves this convolution with the pool behind it, else one sentence.
std::string stem_refuses(const Problem& p);
// The tile, a number of kStemTiles, by a model of Ampere.
int choose_stem(const Problem& p, const Device& device);
// Bytes of shared memory; more than int holds for the absurd.
int64_t stem_shared_bytes(const Problem& p, const StemTile& tile);
StemParams stem_params(const Problem& p, const StemTile& tile, const StemOperands& o);
// Blocks by tiles of pixels and of channels: those that run at a time, or fewer.
struct StemGrid {
  int blocks, channel_tiles, threads, shared_bytes;
};
StemGrid stem_grid(const Problem& p, const StemTile& tile, const Device& device);

// ---- launch_stem.cpp ----
// On the current device. Empty, or why the kernel did not start. Safe in CUDA graph capture.
std::string launch_stem(const Problem& p, Type type, const StemOperands& o, const Device& device,
                        CUstream_st* stream);

// ---- kernels_stem.cu ----
const void* stem_bfloat16(int tile);
const void* stem_float16(int tile);

}  // namespace resnet_fused::sm80
