// From a problem, a choice and pointers to the kernel's parameters.
#pragma once

#include "cuda/sm90/plan.h"

namespace resnet_fused::sm90 {

// Dense tensors at multiples of 16 bytes (the floats: of 4). Null where there is none.
struct Operands {
  bool bfloat16, relu;
  const void *x, *weight, *shortcut_x, *shortcut_weight;
  const float *scale, *shift, *shortcut_scale, *shortcut_shift;
  const void* residual;
  void* y;
  float* partial;
  uint32_t* tickets;
};

}  // namespace resnet_fused::sm90
