// From rows of sums to pooled rows: y = maxpool(act(sum * scale + shift)). Outputs of the
// convolution are rounded before the maximum is taken, as they would be in memory; the ReLU, which
// keeps order and NaN as rounding does, comes behind both.
#pragma once

#include "cuda/sm90/quad_transpose.cuh"
#include "cuda/sm90/stem_multiply.cuh"

namespace resnet_fused::sm90 {

// Of the two channels of a thread, 8 apart.
struct StemAffine {
  float scale[2], shift[2];
};
RF_DEVICE StemAffine stem_affine(const StemParams& p, int channel) {
  StemAffine a;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool in = channel + 8 * h < p.problem.k;
    a.scale[h] = in ? p.scale[channel + 8 * h] : 0.f;
    a.shift[h] = in ? p.shift[channel + 8 * h] : 0.f;
  }
  return a;
}

// Two neighbouring outputs of the convolution in one word, the left one in its low half.
template <typename T, int kN>
RF_DEVICE uint32_t stem_outputs(const float (&sum)[kN / 2], const StemAffine& a, int j, int h) {
  return Pair<T>::pack(fmaf(sum[4 * j + 2 * h], a.scale[h], a.shift[h]),
                       fmaf(sum[4 * j + 2 * h + 1], a.scale[h], a.shift[h]));
}
template <typename T, int kN>
RF_DEVICE void take_row(uint32_t (&best)[kN / 8][2], const float (&sum)[kN / 2],
                        const StemAffine& a) {
#pragma unroll
  for (int j = 0; j < kN / 8; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      best[j][h] = sm80::max_keeping_nan(best[j][h], stem_outputs<T, kN>(sum, a, j, h), T());
}

RF_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
RF_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

// The last of a pooled row's three rows, and the row itself. best: of the rows before; afterwards
// of the last row alone, which the next pooled row has too. last: the row is in the map.
template <typename T, int kN>
RF_DEVICE void pool_row(uint32_t (&best)[kN / 8][2], const float (&sum)[kN / 2], bool last,
                        const StemAffine& a, const StemParams& p, const StemBand& band, int row,
                        int channel, int warp, int lane) {
  constexpr int kGroups = kN / 16;  // of eight pooled outputs
  const int q = lane & 3, from = (lane & ~3) | ((q + 3) & 3);
  const int line = p.pool_w * p.problem.k, k = channel + 16 * warp + 8 * (q & 1);
  T* const y = static_cast<T*>(p.y) + int64_t(band.image * p.pool_h + row) * line + k;
  uint32_t rights = sm80::minus_infinities(T());  // of the pairs before
  uint32_t words[4] = {};
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    uint32_t pooled[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * g + i;
      uint32_t v[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t outputs =
            last ? stem_outputs<T, kN>(sum, a, j, h) : sm80::minus_infinities(T());
        v[h] = sm80::max_keeping_nan(best[j][h], outputs, T());
        best[j][h] = outputs;
      }
      // Now a word is one column of both channels.
      const int pair = band.pair + 4 * j + q;
      const uint32_t left = low_halves(v[0], v[1]);
      const uint32_t right =
          2 * pair + 1 < p.out_w ? high_halves(v[0], v[1]) : sm80::minus_infinities(T());
      const uint32_t before = __shfl_sync(0xffffffffu, q == 3 ? rights : right, from);
      rights = right;
      pooled[i] = sm80::max_keeping_nan(sm80::max_keeping_nan(left, right, T()), before, T());
      if (p.relu) pooled[i] = sm80::max_keeping_nan(pooled[i], 0u, T());
    }
    // 8 x 8 blocks of channels by outputs 0, 4, 1, 5, 2, ... of the group, turned.
    words[g % 2 * 2] = transpose_8x8(low_halves(pooled[0], pooled[1]));
    words[g % 2 * 2 + 1] = transpose_8x8(high_halves(pooled[0], pooled[1]));
    if (g % 2 == 0 && g + 1 < kGroups) continue;
    quad_transpose(words, lane);
    const int r = lane / 4, group = g / 2 * 2 + q / 2;
    const int output = 8 * group + 4 * (r & 1) + r / 2, column = band.pair + output;
    if (group < kGroups && (output > 0 || band.pair == 0) && column < p.pool_w && k < p.problem.k)
      store_16(y + column * p.problem.k, make_uint4(words[0], words[1], words[2], words[3]));
  }
}

}  // namespace resnet_fused::sm90
