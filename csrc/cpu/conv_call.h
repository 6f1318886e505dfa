// One convolution as an op receives it: its arguments, checked, and its run by the plan they name.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "conv.h"
#include "cpu/plan.h"
#include "cpu/tensors.h"

namespace resnet_fused {

// A convolution's input as far as its checks look at it.
struct InputShape {
  ScalarType type;
  DType dtype;
  int64_t batch, channels, height, width;
};

// An op's x, given as (N, C, H, W) or (C, H, W).
struct Image {
  Tensor x;  // 4-D
  InputShape shape;
  bool batched;

  // A 4-D result in as many dimensions as x was given in.
  Tensor like_input(const Tensor& y) const;
};

Image check_image(const OpName& op, const Tensor& x);

// Pairs are (rows, columns).
struct ConvSettings {
  const int64_t *kernel_size, *stride, *padding, *dilation;
  int64_t groups;
  std::string act, plan;
};

// The dtype of the packed weights of a plan of ours.
inline ScalarType packed_dtype(const PlanInfo& plan) {
  return plan.pack > 1 ? ScalarType::BFloat16 : ScalarType::Float;
}

// A checked convolution; scale and shift are dense.
struct ConvCall {
  ConvShape shape;
  DType dtype;
  bool relu;
  Plan plan;
  Tensor packed, scale, shift;
};

ConvCall check_conv(const OpName& op, const InputShape& x, const Tensor& packed,
                    const Tensor& scale, const Tensor& shift, const ConvSettings& settings);

// The output, dense NHWC. x and residual: 4-D of the shapes that the call has, any strides.
// pool: with a stem's max-pool behind the activation (pool.h).
Tensor run_call(const ConvCall& call, const Tensor& x, const std::optional<Tensor>& residual,
                bool pool = false);

}  // namespace resnet_fused
