// The average pool and the linear layer as ops compute them, after their checks.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "conv.h"

namespace resnet_fused {

// The mean over the map: (N, C, 1, 1), dense NHWC. x: (N, C, H, W) of `dtype`, with pixels, any
// strides.
torch::stable::Tensor run_global_avg_pool(DType dtype, const torch::stable::Tensor& x);

// (images, outputs). x: images * inputs values of `dtype`, dense; weight: (outputs, inputs).
torch::stable::Tensor run_linear(DType dtype, const torch::stable::Tensor& x, int64_t images,
                                 const torch::stable::Tensor& weight,
                                 const std::optional<torch::stable::Tensor>& bias);

}  // namespace resnet_fused
