// A convolution without groups as the sm_80 kernels take it, from the arguments of an op.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/dense.h"
#include "cuda/sm80/problem.h"

namespace resnet_fused::cuda {

// x: (N, C, H, W). Sizes that fit no int are refused as what they are, too large.
inline sm80::Problem problem_of(const Sizes& x, int64_t channels, const Sizes& kernel_size,
                                const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  const auto as_int = [](int64_t value) {
    return int(std::clamp<int64_t>(value, INT32_MIN, INT32_MAX));
  };
  sm80::Problem p{};
  p.n = as_int(x[0]);
  p.c = as_int(x[1]);
  p.h = as_int(x[2]);
  p.w = as_int(x[3]);
  p.k = as_int(channels);
  p.r = as_int(kernel_size[0]);
  p.s = as_int(kernel_size[1]);
  p.stride_h = as_int(stride[0]);
  p.stride_w = as_int(stride[1]);
  p.pad_h = as_int(padding[0]);
  p.pad_w = as_int(padding[1]);
  p.dilation_h = as_int(dilation[0]);
  p.dilation_w = as_int(dilation[1]);
  p.groups = p.shortcut_stride_h = p.shortcut_stride_w = 1;
  return p;
}

}  // namespace resnet_fused::cuda
