// The convolution of a tile: from patch and weights in shared memory to sums in registers.
#pragma once

#include "cuda/sm80/stem_load.cuh"

namespace resnet_fused::sm80 {

template <int kTile>
struct StemConfig {
  static constexpr StemTile kT = kStemTiles[kTile];
  static constexpr int kThreads = threads(kT), kPixels = conv_pixels(kT);
  static constexpr int kWarpN = kStemChannels / kT.warps_n;
  static constexpr int kMs = kT.products, kNs = kWarpN / 8;  // a warp's 16 x 8 products
  static_assert(16 * kMs * kT.warps_m >= kPixels, "every pixel has a warp");
  static_assert(kNs % 2 == 0, "channels come in pairs of products");
};

// The segments of a window, one after the other. Of the 4 words of each, a thread has one.
class StemWalk {
 public:
  RF_DEVICE StemWalk(const StemParams& p, int word)
      : left_(p.problem.r * p.layout.segments),
        last_(p.layout.segments - 1),
        next_row_(2 * p.layout.pitch - 16 * last_),
        head_(p.layout.lead && word == 0 ? 0xffff0000u : ~0u) {
    // Elements of the window that the word holds in the last segment of a row.
    const int held = p.layout.lead + p.problem.s * p.problem.c - 8 * last_ - 2 * word;
    tail_ = held >= 2 ? ~0u : held == 1 ? 0xffffu : 0u;
  }
  // Bytes from the first segment to the next, and which elements of the word count. Behind the
  // last: the first once more, of which nothing counts.
  RF_DEVICE void next(int* at, uint32_t* mask) {
    const bool in = left_-- > 0;
    *at = in ? at_ : 0;
    *mask = (in ? ~0u : 0u) & (column_ == 0 ? head_ : ~0u) & (column_ == last_ ? tail_ : ~0u);
    at_ += column_ == last_ ? next_row_ : 16;
    column_ = column_ == last_ ? 0 : column_ + 1;
  }

 private:
  int at_ = 0, column_ = 0, left_;
  const int last_, next_row_;
  const uint32_t head_;
  uint32_t tail_;
};

// Sums lie as everywhere: pixels lane / 4 and lane / 4 + 8, channels lane % 4 * 2 and the next.
template <typename T, typename C>
RF_DEVICE void multiply_stem(float (&sum)[C::kMs][C::kNs][4], const StemParams& p, const T* patch,
                             const T* weights, int warp_m, int warp_n, int lane) {
  const StemLayout& l = p.layout;
  // Bytes to this thread's word of each of its pixels' first segment. Pixels that are not there are
  // the last one.
  int window[C::kMs][2];
#pragma unroll
  for (int i = 0; i < C::kMs; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = warp_m + 16 * i + 8 * h + lane / 4, pixel = m < C::kPixels ? m : C::kPixels - 1;
      const int row = pixel / kConvColumns, column = pixel % kConvColumns;
      window[i][h] = 2 * (row * p.problem.stride_h * l.pitch + l.first +
                          column * p.problem.stride_w * p.problem.c) +
                     lane % 4 * 4;
    }
  const uint8_t* const from = reinterpret_cast<const uint8_t*>(patch);
  // Matrices of weights: channels 0-7 of this segment and the next, then channels 8-15.
  uint32_t channels = shared_address(
      weights + (warp_n + (lane & 7) + (lane >> 4) * 8) * l.weight_pitch + (lane >> 3 & 1) * 8);
  StemWalk walk(p, lane % 4);
#pragma unroll 1
  for (int step = 0; step < l.steps; ++step, channels += 32) {
    int at[2];
    uint32_t mask[2], a[C::kMs][4];
    walk.next(&at[0], &mask[0]);
    walk.next(&at[1], &mask[1]);
#pragma unroll
    for (int i = 0; i < C::kMs; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        a[i][e] =
            *reinterpret_cast<const uint32_t*>(from + window[i][e % 2] + at[e / 2]) & mask[e / 2];
#pragma unroll
    for (int j = 0; j < C::kNs; j += 2) {
      uint32_t b[4];
      load_matrices(b, channels + j * 16 * l.weight_pitch);
#pragma unroll
      for (int i = 0; i < C::kMs; ++i) {
        multiply(sum[i][j], a[i], b, T());
        multiply(sum[i][j + 1], a[i], b + 2, T());
      }
    }
  }
}

}  // namespace resnet_fused::sm80
