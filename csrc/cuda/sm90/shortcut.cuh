// The block's 1 x 1 shortcut as further steps of the same sum (joint_scale.cuh). Rows of weights
// that are taken for zeros are cleared in shared memory.
#pragma once

#include "cuda/sm90/config.cuh"
#include "cuda/sm90/operand.h"
// After it.
#include "cuda/joint_scale.cuh"

namespace resnet_fused::sm90 {

using cuda::Joint;
using cuda::joint_scale;

// What the epilogue applies to the sum of one channel.
struct Affine {
  float scale, shift;
};
template <bool kShortcut>
RF_DEVICE Affine affine_of(const KernelParams& p, int channel) {
  if (channel >= p.schedule.k) return {0.f, 0.f};
  if constexpr (kShortcut)
    return {joint_scale(p, channel).factor, p.shift[channel] + p.shortcut_shift[channel]};
  return {p.scale[channel], p.shift[channel]};
}
RF_DEVICE float finish(float sum, const Affine& a, float residual, bool relu) {
  const float v = fmaf(sum, a.scale, a.shift) + residual;
  return relu ? relu_keeping_nan(v) : v;
}

// Multiplies a warpgroup's accumulators by their channels' ratios. `channel`: its first.
template <typename C>
RF_DEVICE void rescale(float (&sum)[C::kMBlocks][C::kN / 2], const KernelParams& p, int channel,
                       int tid) {
  const int K = p.schedule.k;
  if constexpr (C::kChannelsOnM) {
#pragma unroll
    for (int m = 0; m < C::kMBlocks; ++m) {
      float ratio[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = channel + 64 * m + fragment_row(tid, 2 * half);
        ratio[half] = c < K ? joint_scale(p, c).ratio : 1.f;
      }
#pragma unroll
      for (int r = 0; r < C::kN / 2; ++r) sum[m][r] *= ratio[(r >> 1) & 1];
    }
  } else {
#pragma unroll
    for (int r = 0; r < C::kN / 2; r += 4) {
      const int c = channel + fragment_column(tid, r);
      const float even = c < K ? joint_scale(p, c).ratio : 1.f;  // K % 8 == 0: in or out as one
      const float odd = c < K ? joint_scale(p, c + 1).ratio : 1.f;
#pragma unroll
      for (int m = 0; m < C::kMBlocks; ++m) {
        sum[m][r] *= even;
        sum[m][r + 1] *= odd;
        sum[m][r + 2] *= even;
        sum[m][r + 3] *= odd;
      }
    }
  }
}

// Clears the rows of dead channels in one stage's shortcut weights; `rows` points at the first.
// Ends with a barrier of the team, behind which wgmma may read: the stores went through another
// path to shared memory than wgmma's reads, so each storing thread orders them first.
template <typename C>
RF_DEVICE void clear_dead_rows(uint8_t* rows, const KernelParams& p, int channel, int thread,
                               int barrier) {
  for (int row = thread; row < C::kTileChannels; row += C::kTeam) {
    const int c = channel + row;
    if (c >= p.schedule.k || !joint_scale(p, c).dead) continue;
#pragma unroll
    for (int i = 0; i < C::kSpan; i += 16)
      *reinterpret_cast<uint4*>(rows + row * C::kSpan + i) = make_uint4(0, 0, 0, 0);
  }
  async_proxy_fence();
  group_barrier<C::kTeam>(barrier);
}
template <typename C>
RF_DEVICE bool any_dead(const KernelParams& p, int channel, int thread, int barrier) {
  bool dead = false;
  for (int row = thread; row < C::kTileChannels; row += C::kTeam) {
    const int c = channel + row;
    dead |= c < p.schedule.k && joint_scale(p, c).dead;
  }
  return group_any<C::kTeam>(barrier, dead);
}

}  // namespace resnet_fused::sm90
