// A convolution on a GPU, from tensors to its launch: what stays the same from call to call, and
// what each call brings.
#pragma once

#include <string>

#include "cuda/context.h"
#include "cuda/conv_arguments.h"
#include "cuda/conv_problem.h"
#include "cuda/sm80/launch.h"
#ifndef RESNET_FUSED_WITHOUT_SM90
#include "cuda/sm90/launch.h"
#endif

namespace resnet_fused::cuda {

// What kernels are chosen by.
struct Wanted {
  ConvSizes sizes;
  sm80::Type type;
};

// Empty where the sm_90a kernel can serve, else one sentence.
std::string sm90_refuses(const Wanted& wanted, const DeviceFacts& facts);
std::string no_config(const std::string& text);

// All but the images. Tensors are dense.
struct Conv {
  const char* op;  // which sentences begin with
  Wanted wanted;
  Sizes out;  // (N, K, P, Q)
  bool relu;
  std::string config;  // empty: the rule's
  Tensor packed, scale, shift;
  MaybeTensor shortcut_packed, shortcut_scale, shortcut_shift;
};

// Of arguments that were checked, with an output of `out`, on the current device. Throws where a
// tensor has more elements than the kernels count.
Conv conv_of(const ConvArguments& a, const Sizes& out, const std::string& config);

// The output, (N, K, P, Q), on the current stream of the current device. x and shortcut_x have the
// sizes that conv_of was given, residual the output's; copied where they are not dense.
Tensor launch(const Conv& conv, const Tensor& x, const MaybeTensor& residual,
              const MaybeTensor& shortcut_x);

// The same for a convolution with a max-pool behind it, in one kernel (stem_op.cpp). `out`: of the
// convolution, before the pool; Conv::out is what lies behind it.
Conv pooled_conv_of(const ConvArguments& a, const Sizes& out);
Tensor launch_with_pool(const Conv& conv, const Tensor& x);

}  // namespace resnet_fused::cuda
