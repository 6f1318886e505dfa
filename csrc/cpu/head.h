// What follows the last block of a ResNet: the mean over the map, and a linear layer.
//
// Called again and again PyTorch's own take 0.01 and 0.02 ms. Within a net they take 0.17 and, in
// bfloat16, 0.18: the weights of the last stage have pushed their code, a hundred kilobytes that
// serve every shape and type, out of all caches. These few lines take 0.08 and 0.05 there.
#pragma once

#include <cstdint>

#include "conv.h"

namespace resnet_fused {

// y[image][channel] = mean over the pixels of x[image][pixel][channel]; dense, sums in float.
struct MeanArgs {
  DType dtype;
  int64_t pixels, channels;
  const void* x;
  void* y;
};

// Channels of one step of `mean`.
constexpr int64_t kMeanChannels = 64;

inline int64_t mean_steps(int64_t channels) { return ceil_div(channels, kMeanChannels); }

// y[image][output] = sum of x[image][input] * weight[output][input], + bias[output]; dense, sums in
// float.
struct LinearArgs {
  DType dtype;
  int64_t images, inputs, outputs;
  const void* x;
  const void* weight;
  const void* bias;  // may be null
  void* y;
};

}  // namespace resnet_fused
