// The max-pool of a ResNet's stem: 3 x 3, stride 2, padding 1, which is minus infinity.
#pragma once

#include <cstdint>

#include "conv.h"

namespace resnet_fused {

// Rows or columns that are left of `size`; pooled pixel i sees 2i - 1, 2i and 2i + 1.
inline int64_t pooled(int64_t size) { return (size - 1) / 2 + 1; }

// y = max_pool(x), both dense NHWC.
struct PoolArgs {
  DType dtype;
  int64_t in_h, in_w, channels;
  const void* x;
  void* y;
};

}  // namespace resnet_fused
