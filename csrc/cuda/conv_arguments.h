// The arguments of conv_bn_act_cuda and of the ops with a max-pool or a 1 x 1 convolution behind
// it, checked: one sentence for each that does not fit.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "cuda/dense.h"

namespace resnet_fused::cuda {

using IntPair = std::vector<int64_t>;

struct ConvArguments {
  const char* op;  // which sentences begin with
  const Tensor &x, &packed, &scale, &shift;
  const MaybeTensor &residual, &shortcut_x, &shortcut_packed, &shortcut_scale, &shortcut_shift;
  const IntPair &kernel_size, &stride, &padding, &dilation;
  int64_t groups;
  const std::string& act;
  const IntPair& shortcut_stride;
};

// (N, C, H, W), N being 1 for a 3-D x.
std::vector<int64_t> image_sizes(const Tensor& x);

// Throws, or returns the output's shape: (N, K, P, Q), N being 1 for a 3-D x.
std::vector<int64_t> check_arguments(const ConvArguments& a);

}  // namespace resnet_fused::cuda
