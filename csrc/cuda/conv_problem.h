// A convolution as the kernels take it, from sizes as an op is given them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/dense.h"
#include "cuda/problem.h"

namespace resnet_fused::cuda {

struct ConvSizes {
  Sizes x;  // (N, C, H, W)
  int64_t out_channels;
  Sizes kernel_size, stride, padding, dilation;  // rows and columns
  int64_t groups = 1;
  Sizes shortcut_x = {};  // (N, C, H, W) of what a 1 x 1 shortcut convolves, empty without one
  Sizes shortcut_stride = {1, 1};
};

// Sizes that fit no int are refused as what they are, too large.
inline Problem problem_of(const ConvSizes& sizes) {
  const auto as_int = [](int64_t value) {
    return int(std::clamp<int64_t>(value, INT32_MIN, INT32_MAX));
  };
  Problem p{};
  p.n = as_int(sizes.x[0]);
  p.c = as_int(sizes.x[1]);
  p.h = as_int(sizes.x[2]);
  p.w = as_int(sizes.x[3]);
  p.k = as_int(sizes.out_channels);
  p.r = as_int(sizes.kernel_size[0]);
  p.s = as_int(sizes.kernel_size[1]);
  p.stride_h = as_int(sizes.stride[0]);
  p.stride_w = as_int(sizes.stride[1]);
  p.pad_h = as_int(sizes.padding[0]);
  p.pad_w = as_int(sizes.padding[1]);
  p.dilation_h = as_int(sizes.dilation[0]);
  p.dilation_w = as_int(sizes.dilation[1]);
  p.groups = as_int(sizes.groups);
  p.shortcut_stride_h = p.shortcut_stride_w = 1;
  if (!sizes.shortcut_x.empty()) {
    p.shortcut_c = as_int(sizes.shortcut_x[1]);
    p.shortcut_h = as_int(sizes.shortcut_x[2]);
    p.shortcut_w = as_int(sizes.shortcut_x[3]);
    p.shortcut_stride_h = as_int(sizes.shortcut_stride[0]);
    p.shortcut_stride_w = as_int(sizes.shortcut_stride[1]);
  }
  return p;
}

}  // namespace resnet_fused::cuda
