// Checks of tensors that every op makes, and what the kernels call a tensor's elements.
#pragma once

#include "cuda/sm80/plan.h"
#include "op/tensors.h"

namespace resnet_fused::cuda {

// Throws where a tensor is not on a CUDA device.
void check_device(const char* op, const char* name, const Tensor& tensor);

// Throws where a tensor has another dtype, or is not on the device of x, which the op may call
// otherwise.
void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                ScalarType type, const char* x_name = "x");

// Throws where a tensor is neither float32, bfloat16 nor float16. Float32 is taken as it is: who
// multiplies asks torch whether TF32 will do.
sm80::Type check_elements(const char* op, const char* name, const Tensor& tensor);

}  // namespace resnet_fused::cuda
