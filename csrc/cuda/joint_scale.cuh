// A block's last convolution and its 1 x 1 shortcut in one accumulator: by what it is multiplied.
//
//   y = s * main + t + (u * shortcut + v)      s, u: the scales of the two batch norms
//     = u * ((s / u) * main + shortcut) + t + v
//
// Between the two ranges of the reduction the accumulator is multiplied by s / u, channel by
// channel, and the epilogue multiplies by u. The weights stay as they were trained.
//
// Where u is zero, or s / u so large that the product could overflow, the shortcut adds less than
// 2^-64 of what the main branch may: then the accumulator is multiplied by s, the epilogue by 1,
// and the channel's shortcut weights are taken for zeros, so that what they would add is
// 0 * input: zero, or NaN where eager PyTorch has NaN.
//
// Included behind an architecture's ptx.cuh, which defines RF_DEVICE.
#pragma once

namespace resnet_fused::cuda {

struct Joint {
  float ratio, factor;  // of the accumulator between the ranges; of the whole sum
  bool dead;            // the shortcut's weights are taken for zeros
};
RF_DEVICE Joint joint_scale(float scale, float shortcut_scale) {
  constexpr float kRange = 18446744073709551616.f;  // 2^64
  // A NaN in either compares false, and goes through the ratio into the sum.
  if (shortcut_scale == 0.f || fabsf(shortcut_scale) * kRange < fabsf(scale))
    return {scale, 1.f, true};
  return {scale / shortcut_scale, shortcut_scale, false};
}
// params: any kernel's with `scale` and `shortcut_scale`, floats by channel in global memory.
template <typename Params>
RF_DEVICE Joint joint_scale(const Params& params, int channel) {
  return joint_scale(params.scale[channel], params.shortcut_scale[channel]);
}

}  // namespace resnet_fused::cuda
