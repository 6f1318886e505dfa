// Arguments of the memory-bound passes.
#pragma once

#include <cstdint>

#include "conv.h"

namespace resnet_fused {

// y = act(y * scale + shift + residual), dense NHWC; scale and shift are float, double where y is
// double.
struct EpilogueArgs {
  DType dtype;
  bool relu;
  int64_t channels;
  const void* scale;
  const void* shift;
  const void* residual;  // may be null
  void* y;
};

// y = relu(a + b), all three with the same dense layout.
struct AddReluArgs {
  DType dtype;
  const void* a;
  const void* b;
  void* y;
};

}  // namespace resnet_fused
