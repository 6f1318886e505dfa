// From a problem, a choice and pointers to a launch on the current device. The strings are empty,
// or the sentence that says why a kernel did not start. Safe in CUDA graph capture.
#pragma once

#include "cuda/sm80/plan.h"

struct CUstream_st;

namespace resnet_fused::sm80 {

std::string launch(const Problem& p, Type type, const Choice& choice, const Operands& o,
                   CUstream_st* stream);

// y = relu(a + b), `count` elements each; the type's way to multiply does not matter.
std::string launch_add_relu(Type type, const void* a, const void* b, void* y, int64_t count,
                            const Device& device, CUstream_st* stream);

}  // namespace resnet_fused::sm80
