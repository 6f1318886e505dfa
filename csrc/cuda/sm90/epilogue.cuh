// From accumulators to the output in registers alone: y = act(sum * scale + shift + residual), in
// float32, 16 bytes a thread. For tiles of one consumer, pixels on M, whose blocks end right behind
// it: two warpgroups that go on have staged_store.cuh.
//
// A thread's accumulators are pairs of neighbouring channels. A 4 x 4 transposition of words among
// the four lanes of a quad gives each lane eight channels of one pixel. The residual comes in the
// same way, backwards.
#pragma once

#include "cuda/sm90/operand.h"
#include "cuda/sm90/quad_transpose.cuh"
#include "cuda/sm90/shortcut.cuh"

namespace resnet_fused::sm90 {

// Where a vector of eight channels is in y and in the residual; negative outside the tensor.
RF_DEVICE int64_t offset_of(const Schedule& s, int pixel, int channel) {
  return pixel < s.pixels && channel < s.k ? int64_t(pixel) * s.k + channel : -1;
}
template <typename T>
RF_DEVICE void load_residual(uint32_t (&w)[4], const KernelParams& p, int64_t offset) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (p.residual && offset >= 0) v = load_once(static_cast<const T*>(p.residual) + offset);
  w[0] = v.x;
  w[1] = v.y;
  w[2] = v.z;
  w[3] = v.w;
}
template <typename T>
RF_DEVICE void store(const uint32_t (&w)[4], const KernelParams& p, int64_t offset) {
  if (offset >= 0) store_16(static_cast<T*>(p.y) + offset, make_uint4(w[0], w[1], w[2], w[3]));
}

// One warpgroup's share of a tile whose first pixel and channel these are.
template <typename T, typename C, bool kShortcut>
RF_DEVICE void store_at_once(const float (&sum)[C::kMBlocks][C::kN / 2], const KernelParams& p,
                             int pixel, int channel, int tid) {
  constexpr int kHalves = 2 * C::kMBlocks;  // of 64 rows: eight pixels each warp
  const int lane = tid & 31;
#pragma unroll
  for (int j = 0; j < C::kN / 32; ++j) {
    if (channel + 32 * j >= p.schedule.k) break;
    uint32_t w[kHalves][4];
    int64_t offset[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const Vector v = vector_pixels_on_m(tid, h & 1, j);
      offset[h] = offset_of(p.schedule, pixel + 64 * (h >> 1) + v.pixel, channel + v.channel);
      load_residual<T>(w[h], p, offset[h]);
    }
    Affine even[4], odd[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = channel + fragment_column(tid, 4 * (4 * j + i));
      even[i] = affine_of<kShortcut>(p, c);
      odd[i] = affine_of<kShortcut>(p, c + 1);
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      if (p.residual) quad_transpose(w[h], lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const s = &sum[h >> 1][4 * (4 * j + i) + 2 * (h & 1)];
        const float2 r = Pair<T>::unpack(w[h][i]);
        w[h][i] =
            Pair<T>::pack(finish(s[0], even[i], r.x, p.relu), finish(s[1], odd[i], r.y, p.relu));
      }
      quad_transpose(w[h], lane);
      store<T>(w[h], p, offset[h]);
    }
  }
}

}  // namespace resnet_fused::sm90
