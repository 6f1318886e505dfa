// From a problem, a choice and pointers to a launch.
#pragma once

#include "cuda/sm90/plan.h"

struct CUstream_st;

namespace resnet_fused::sm90 {

// Dense tensors whose addresses are multiples of 16. Null where there is none.
struct Operands {
  bool bfloat16, relu;
  const void *x, *weight, *shortcut_x, *shortcut_weight;
  const float *scale, *shift, *shortcut_scale, *shortcut_shift;
  const void* residual;
  void* y;
};

// Starts the kernel on the current device, of capability 9.0. Empty, or the sentence that says why
// it did not start. Safe in CUDA graph capture.
//
// The launch may overlap the end of the kernel before it in the stream (programmatic dependent
// launch); overlap.h says when, and when it may load weights before that one has ended.
std::string launch(const Problem& p, const Choice& choice, const Operands& o, const Device& device,
                   CUstream_st* stream);

}  // namespace resnet_fused::sm90
