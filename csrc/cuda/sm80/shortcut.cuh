// The block's 1 x 1 shortcut as further steps of the same sum.
//
//   y = s * main + t + (u * shortcut + v)      s, u: the scales of the two batch norms
//     = u * ((s / u) * main + shortcut) + t + v
//
// One accumulator serves: between the two ranges of the reduction it is multiplied by s / u,
// channel by channel, and the epilogue multiplies by u. The weights stay as they were trained.
//
// Where u is zero, or s / u so large that the product could overflow, the shortcut adds less than
// 2^-64 of what the main branch may: then the accumulator is multiplied by s, the epilogue by 1,
// and the channel's shortcut weights are taken for zeros, so that what they would add is
// 0 * input: zero, or NaN where eager PyTorch has NaN.
#pragma once

#include "cuda/sm80/config.cuh"

namespace resnet_fused::sm80 {

struct Joint {
  float ratio, factor;  // of the sum between the ranges; of the whole sum
  bool dead;            // the shortcut's weights are taken for zeros
};
RF_DEVICE Joint joint_scale(const KernelParams& p, int channel) {
  constexpr float kRange = 18446744073709551616.f;  // 2^64
  const float scale = __ldg(p.scale + channel), other = __ldg(p.shortcut_scale + channel);
  // A NaN in either compares false, and goes through the ratio into the sum.
  if (other == 0.f || fabsf(other) * kRange < fabsf(scale)) return {scale, 1.f, true};
  return {scale / other, other, false};
}

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
