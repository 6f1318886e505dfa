// From accumulators to the output over shared memory: y = act(sum * scale + shift + residual), in
// float32. A warpgroup writes its part of the tile where TMA takes it from; the residual comes the
// same way, into the same place, while the products run.
//
// In registers alone, 16 bytes a thread with transpositions among lanes and an address for each,
// this was a chain of some 190 instructions for eight outputs, and on an H100 the epilogue took
// four times as long as the products of 64 channels of 56 x 56 (ncu: 22% of issue slots, half of
// the stalls on loads; fetching the residual to L2 ahead changed 105 us to 101).
//
// The place holds 64 channels of each pixel, 128 bytes, swizzled as TMA does it: then stmatrix and
// ldmatrix find eight rows on different banks. With channels on M they transpose.
#pragma once

#include "cuda/sm90/shortcut.cuh"

namespace resnet_fused::sm90 {

// One warpgroup's place: `address` in the shared window, `landed` the mbarrier of its residual.
// kGroups of 64 channels, kPixels each.
template <int kPixels, int kGroups>
struct Place {
  uint32_t address, landed;
  uint32_t loads;  // so far, of residuals

  // The chunk of eight channels number `chunk` of a pixel.
  RF_DEVICE uint32_t at(int pixel, int chunk) const {
    return address + (chunk >> 3) * (kPixels * 128) + pixel * 128 + (((chunk ^ pixel) & 7) << 4);
  }
  // By the thread that also stores: the stores before have left the place, and the residual of the
  // next tile may fill it. `from`: where the tile is in the output's map.
  RF_DEVICE void begin(const KernelParams& p, int channel, int w, int h, int n) const {
    wait_for_stores_to_read();
    if (!p.residual) return;
    const int groups = min(kGroups, (p.schedule.k - channel + 63) / 64);
    if (groups <= 0) return;
    barrier_expect(landed, groups * (p.place_pixels * 128));
#pragma unroll 1
    for (int g = 0; g < groups; ++g)
      tma_window(address + g * (kPixels * 128), &p.residual_map, landed, channel + 64 * g, w, h, n);
  }
  RF_DEVICE void store(const KernelParams& p, int channel, int w, int h, int n) const {
#pragma unroll 1
    for (int g = 0; g < kGroups && channel + 64 * g < p.schedule.k; ++g)
      tma_store(address + g * (kPixels * 128), &p.y_map, channel + 64 * g, w, h, n);
    commit_stores();
  }
};

// The eight outputs that a thread has of 16 rows by 16 columns of accumulators; kHalf: of 16 by 8.
template <typename T, bool kTransposed, bool kHalf>
RF_DEVICE void finish_block(const float* s, const Affine (&affine)[4], uint32_t at, bool residual,
                            bool relu) {
  uint32_t w[4] = {};
  if (residual) load_matrices<kTransposed, kHalf>(w, at);
#pragma unroll
  for (int i = 0; i < (kHalf ? 2 : 4); ++i) {
    const float2 r = Pair<T>::unpack(w[i]);
    // Transposed, a pair has one channel: of rows i & 1; else two neighbours of columns i >> 1.
    const Affine& first = affine[kTransposed ? i & 1 : 2 * (i >> 1)];
    const Affine& second = affine[kTransposed ? i & 1 : 2 * (i >> 1) + 1];
    w[i] =
        Pair<T>::pack(finish(s[2 * i], first, r.x, relu), finish(s[2 * i + 1], second, r.y, relu));
  }
  store_matrices<kTransposed, kHalf>(at, w);
}

// A warpgroup's sums, through its place, to the output; all its threads. `channel`: its first;
// (w, h, n): its first pixel in the output's map. `barrier`: the warpgroup's.
template <typename T, typename C, bool kShortcut, typename APlace>
RF_DEVICE void store_by_tma(const float (&sum)[C::kMBlocks][C::kN / 2], const KernelParams& p,
                            APlace& place, int channel, int w, int h, int n, int tid, int barrier) {
  const int lane = tid & 31, warp = tid >> 5;
  const bool residual = p.residual && channel < p.schedule.k;
  if (residual) {
    barrier_wait(place.landed, place.loads++ & 1u);
  } else {
    group_barrier<128>(barrier);  // one thread has waited for the stores before
  }
#pragma unroll
  for (int m = 0; m < C::kMBlocks; ++m) {
    Affine affine[4];
    if constexpr (C::kChannelsOnM) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        affine[half] = affine_of<kShortcut>(p, channel + 64 * m + fragment_row(tid, 2 * half));
    }
#pragma unroll
    for (int j = 0; j < (C::kN + 15) / 16; ++j) {
      // Lanes give the rows' addresses, eight for each of the four matrices.
      if constexpr (C::kChannelsOnM) {
        constexpr bool kOdd = C::kN % 16 != 0;
        const uint32_t at =
            place.at(16 * j + 8 * (lane >> 4) + (lane & 7), 8 * m + 2 * warp + ((lane >> 3) & 1));
        if (kOdd && j == C::kN / 16) {
          finish_block<T, true, true>(&sum[m][8 * j], affine, at, residual, p.relu);
        } else {
          finish_block<T, true, false>(&sum[m][8 * j], affine, at, residual, p.relu);
        }
      } else {
        const int c = channel + 16 * j;
        if (c >= p.schedule.k) break;
#pragma unroll
        for (int i = 0; i < 4; ++i)
          affine[i] = affine_of<kShortcut>(p, c + 8 * (i >> 1) + 2 * (lane & 3) + (i & 1));
        const uint32_t at = place.at(64 * m + 16 * warp + (lane & 15), 2 * j + (lane >> 4));
        finish_block<T, false, false>(&sum[m][8 * j], affine, at, residual, p.relu);
      }
    }
  }
  async_proxy_fence();  // TMA sees what the barrier collects
  group_barrier<128>(barrier);
  if (tid == 0) place.store(p, channel, w, h, n);
}

}  // namespace resnet_fused::sm90
