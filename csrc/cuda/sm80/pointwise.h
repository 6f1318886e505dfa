// How pointwise kernels cut their work: a grid of one wave, or less, that strides over the rest.
#pragma once

#include "cuda/sm80/plan.h"

namespace resnet_fused::sm80 {

constexpr int kPointwiseThreads = 256;

// Blocks of kPointwiseThreads that fill the device, or fewer. elements_each: of a thread and step.
int pointwise_blocks(int64_t count, int elements_each, const Device& device);

}  // namespace resnet_fused::sm80
