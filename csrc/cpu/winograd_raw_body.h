// The products of fused Winograd where few tiles share the weights: kernels stay as they are in
// memory, and are transformed in registers just before they are multiplied.
//
// F(4x4)'s transformed weights are four times as large as the kernels: 37.7 MB at 512 channels,
// which take 1.2 ms to come from memory at 31 GB/s, while their products for the four tiles of a 7
// x 7 map take 0.3. F(2x2) needs 16.8 MB and 0.56 ms of products. This one reads 9.4 MB. A row of 6
// points by 4 tiles by a vector of output channels is summed in 24 registers; for each input
// channel at most 6 multiply-adds transform the columns of the kernel, 6 the row, and 24 take the
// products. Measured at 512 to 512 channels of 7 x 7, one image, on 2 cores of Zen 4: 0.52 ms where
// F(2x2) takes 0.66 to 0.70, and ResNet-18 becomes 1.05 times as fast (1.04 at batch 2).
// Transforming blocks of 64 channels into L2 first, for the register tile of gemm_body.h, took
// 0.67. AVX2 lacks the 24 registers: 0.97 to 1.02 ms where F(2x2) takes 0.73
// to 0.80.
#include "cpu/winograd.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// A block of input channels, and what of it multiply_raw_row takes now.
struct RawBlock {
  const float* raw;                 // [channel][tap][32], at the output channels of now
  int64_t channels;                 // at most kRawChannels
  const float* next;                // the block behind it, to be fetched meanwhile,
  int64_t pass;                     // a share in every pass over this one
  const float* values;              // of point 0, at the tile of now
  int64_t values_step, chunk_step;  // between points, between chunks
  float* sums;                      // of point 0, at the tile and the output channels of now
  int64_t sums_step;                // between points
  bool first;                       // nothing has been summed yet
};

constexpr int64_t kRawChannels = kBlockChunks * kChunk;  // summed in one go
constexpr int kRawTiles = 4;                             // at once

// w[0] + p w[1] + p^2 w[2] at the finite point of a place, w[2] at infinity: G w but for a factor,
// by which sums are multiplied in the end instead.
template <class F, int kPlace>
static inline __attribute__((always_inline)) Reg taps_at(const float* taps, int64_t step) {
  typedef WinogradSizes<F> S;
  if constexpr (kPlace == S::kFinite) {
    return Vec::load(taps + 2 * step);
  } else if constexpr (constexpr float kPoint = S::point(kPlace); kPoint == 0.0f) {
    return Vec::load(taps);
  } else {
    const Reg value = Vec::fma(Vec::set1(kPoint), Vec::load(taps + step), Vec::load(taps));
    return Vec::fma(Vec::set1(kPoint * kPoint), Vec::load(taps + 2 * step), value);
  }
}

// The sums of one row of points, of kTiles tiles, and of a vector of output channels.
template <class F, int kRow, int kTiles>
static __attribute__((noinline)) void multiply_raw_row(const RawBlock& block) {
  static_assert(F::kStride == 1, "taps of a stride of 2 are not all interpolated");
  typedef WinogradSizes<F> S;
  static constexpr WeightTransform<F> kTable{};
  constexpr int kPoints = S::kPoints, kZeros = F::kZero ? 1 : 0;
  constexpr int64_t kChannel = kKernelTaps * kPanel;  // floats
  constexpr int64_t kLines = kChannel / kLine, kPasses = kPoints * kPanel / Vec::kWidth;
  static_assert(kLines <= 2 * kPasses, "a pass fetches two lines of a channel");
  Reg sum[kPoints][kTiles];
  clear(sum);
  const float* raw = block.raw;
  const float* next = block.next + block.pass * kLines / kPasses * kLine;
  const float* values = block.values + kRow * kPoints * block.values_step;
  const int64_t step = block.values_step;
  for (int64_t left = block.channels; left > 0; left -= kChunk, values += block.chunk_step) {
    const int64_t channels = min_of(left, kChunk);
#pragma GCC unroll 1
    for (int64_t c = 0; c < channels; ++c, raw += kChannel, next += kChannel) {
      __builtin_prefetch(next, 0, 2);
      __builtin_prefetch(next + kLine, 0, 2);
      const auto multiply = [&](int point, Reg weight) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int t = 0; t < kTiles; ++t) {
          const Reg value = Vec::set1(values[point * step + t * kChunk + c]);
          sum[point][t] = Vec::fma(weight, value, sum[point][t]);
        }
      };
      Reg w[3];
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) w[j] = taps_at<F, kRow>(raw + j * kPanel, 3 * kPanel);
      if (F::kZero) multiply(0, w[0]);
#pragma GCC unroll 3
      for (int i = 0; i < F::kPairs; ++i) {
        const Reg point = Vec::set1(F::kPoints[i]);
        const Reg even = Vec::fma(Vec::set1(F::kPoints[i] * F::kPoints[i]), w[2], w[0]);
        multiply(kZeros + 2 * i, Vec::fma(point, w[1], even));
        multiply(kZeros + 2 * i + 1, Vec::fnma(point, w[1], even));
      }
      multiply(S::kFinite, w[2]);
    }
  }
  const auto factor = [](int place) { return place < S::kFinite ? kTable.value[place][0] : 1.0; };
  float* sums = block.sums + kRow * kPoints * block.sums_step;
  const bool first = block.first;
#pragma GCC unroll 9
  for (int j = 0; j < kPoints; ++j, sums += block.sums_step) {
    const Reg scale = Vec::set1(factor(kRow) * factor(j));
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
      float* const total = sums + t * kPanel;
      Vec::store(total, Vec::fma(sum[j][t], scale, first ? Vec::zero() : Vec::load(total)));
    }
  }
}

template <class F, int kRow, int kTiles>
static void multiply_raw_tiles(int64_t tiles, const RawBlock& block) {
  if (tiles == kTiles) {
    multiply_raw_row<F, kRow, kTiles>(block);
  } else if constexpr (kTiles > 1) {
    multiply_raw_tiles<F, kRow, kTiles - 1>(tiles, block);
  }
}

// `count` tiles, from row kRow of points on; `block` describes the first of them.
template <class F, int kRow = 0>
static void multiply_raw_rows(int64_t count, RawBlock& block) {
  const float* const values = block.values;
  float* const sums = block.sums;
  for (int64_t t = 0; t < count; t += kRawTiles) {
    block.values = values + t * kChunk;
    block.sums = sums + t * kPanel;
    multiply_raw_tiles<F, kRow, kRawTiles>(min_of(count - t, kRawTiles), block);
  }
  block.values = values;
  block.sums = sums;
  ++block.pass;
  if constexpr (kRow + 1 < WinogradSizes<F>::kPoints) multiply_raw_rows<F, kRow + 1>(count, block);
}

// sums[point] = values[point] x transformed kernels of the panel, for every point.
template <class F>
static void multiply_raw(const ConvArgs& args, int64_t count, int64_t panel, const float* values,
                         float* sums) {
  const ConvShape& s = args.shape;
  const float* raw = args.packed + panel * s.in_channels * kKernelTaps * kPanel;
  RawBlock block;
  block.values_step = values_stride(s, 1, count);
  block.chunk_step = count * kChunk;
  block.sums_step = sums_stride(count);
  for (int64_t c = 0; c < s.in_channels; c += kRawChannels, raw = block.next) {
    block.channels = min_of(s.in_channels - c, kRawChannels);
    block.next = raw + block.channels * kKernelTaps * kPanel;
    block.pass = 0;
    block.first = c == 0;
    block.values = values + c * count;
    for (int64_t col = 0; col < kPanel; col += Vec::kWidth) {
      block.raw = raw + col;
      block.sums = sums + col;
      multiply_raw_rows<F>(count, block);
    }
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
