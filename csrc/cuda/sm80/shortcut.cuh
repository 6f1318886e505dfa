// The block's 1 x 1 shortcut as further steps of the same sum (joint_scale.cuh).
#pragma once

#include "cuda/sm80/config.cuh"
// After it.
#include "cuda/joint_scale.cuh"

namespace resnet_fused::sm80 {

using cuda::Joint;
using cuda::joint_scale;

// What the epilogue applies to the sum of one channel.
struct Affine {
  float scale, shift;
};
template <bool kShortcut>
RF_DEVICE Affine affine_of(const KernelParams& p, int channel) {
  if constexpr (kShortcut)
    return {joint_scale(p, channel).factor,
            __ldg(p.shift + channel) + __ldg(p.shortcut_shift + channel)};
  return {__ldg(p.scale + channel), __ldg(p.shift + channel)};
}

// Multiplies a thread's sums by their channels' ratios. `channel`: the warp's first; `end`: the
// first that is not the tensor's.
template <typename C>
RF_DEVICE void rescale(float (&sum)[C::kMs][C::kNs][4], const KernelParams& p, int channel, int end,
                       int lane) {
#pragma unroll
  for (int j = 0; j < C::kNs; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int c = channel + 8 * j + lane % 4 * 2 + e;
      const float ratio = c < end ? joint_scale(p, c).ratio : 1.f;
#pragma unroll
      for (int i = 0; i < C::kMs; ++i) {
        sum[i][j][e] *= ratio;
        sum[i][j][2 + e] *= ratio;
      }
    }
}

}  // namespace resnet_fused::sm80
