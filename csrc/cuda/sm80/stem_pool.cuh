// From a tile's sums to pooled outputs: y = maxpool(act(sum * scale + shift)). The convolution's
// outputs are rounded to their type before, as they would be in memory.
#pragma once

#include "cuda/sm80/stem_multiply.cuh"

namespace resnet_fused::sm80 {

// To shared memory, [pixels][kOutputPitch]. K is a multiple of 8: a product has all its channels or
// none.
template <typename T, typename C>
RF_DEVICE void activate_stem(const float (&sum)[C::kMs][C::kNs][4], const StemParams& p, T* outputs,
                             int channel, int warp_m, int warp_n, int lane) {
#pragma unroll
  for (int j = 0; j < C::kNs; ++j) {
    if (channel + warp_n + 8 * j >= p.problem.k) break;
    const int k = warp_n + 8 * j + lane % 4 * 2;
    float scale[2], shift[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      scale[e] = __ldg(p.scale + channel + k + e);
      shift[e] = __ldg(p.shift + channel + k + e);
    }
#pragma unroll
    for (int i = 0; i < C::kMs; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int m = warp_m + 16 * i + 8 * h + lane / 4;
        Pair<T> pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float v = fmaf(sum[i][j][2 * h + e], scale[e], shift[e]);
          pair.v[e] = from_float<T>(p.relu ? relu_keeping_nan(v) : v);
        }
        if (m < C::kPixels) *reinterpret_cast<Pair<T>*>(outputs + m * kOutputPitch + k) = pair;
      }
  }
}

struct alignas(16) Words4 {
  uint32_t v[4];
};
template <typename T>
RF_DEVICE void take_greater(Words4& best, const Words4& other) {
#pragma unroll
  for (int i = 0; i < 4; ++i) best.v[i] = max_keeping_nan(best.v[i], other.v[i], T());
}

// A thread pools 8 channels of two outputs, one above the other, which share a row of the
// convolution. What is outside of the convolution's map does not count, unlike a zero.
template <typename T, typename C>
RF_DEVICE void pool_stem(const StemParams& p, const T* outputs, const StemPlace& place, int channel,
                         int thread) {
  constexpr int kVectors = kStemChannels / 8, kItems = C::kT.rows / 2 * kPoolColumns * kVectors;
  for (int item = thread; item < kItems; item += C::kThreads) {
    const int vector = item % kVectors, column = item / kVectors % kPoolColumns;
    const int row = item / (kVectors * kPoolColumns) * 2;
    const int y_row = place.row + row, y_column = place.column + column, k = channel + 8 * vector;
    if (y_row >= p.pool_h || y_column >= p.pool_w || k >= p.problem.k) continue;
    // The greatest of three neighbours in a row of the convolution.
    const auto greatest = [&](int r) {
      const int conv_row = 2 * y_row - 1 + r;
      Words4 best;
#pragma unroll
      for (int i = 0; i < 4; ++i) best.v[i] = minus_infinities(T());
#pragma unroll
      for (int s = 0; s < 3; ++s) {
        const int conv_column = 2 * y_column - 1 + s;
        if (conv_row < 0 || conv_row >= p.out_h || conv_column < 0 || conv_column >= p.out_w)
          continue;
        const int m = (2 * row + r) * kConvColumns + 2 * column + s;
        take_greater<T>(best,
                        *reinterpret_cast<const Words4*>(outputs + m * kOutputPitch + 8 * vector));
      }
      return best;
    };
    const int line = p.pool_w * p.problem.k;
    T* const y = static_cast<T*>(p.y) + int64_t(place.image * p.pool_h + y_row) * line +
                 y_column * p.problem.k + k;
    const Words4 between = greatest(2);
    Words4 best = greatest(0);
    take_greater<T>(best, greatest(1));
    take_greater<T>(best, between);
    *reinterpret_cast<Words4*>(y) = best;
    if (y_row + 1 >= p.pool_h) continue;
    best = greatest(3);
    take_greater<T>(best, greatest(4));
    take_greater<T>(best, between);
    *reinterpret_cast<Words4*>(y + line) = best;
  }
}

}  // namespace resnet_fused::sm80
