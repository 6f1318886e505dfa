// A residual block as an op receives it: its arguments, checked, and its run by their plans.
#pragma once

#include <vector>

#include "cpu/conv_call.h"

namespace resnet_fused {

// The arguments of all convolutions, main path first: pairs of integers lie one after the other.
struct ConvLists {
  const std::vector<Tensor>&packed, &scales, &shifts;
  const std::vector<int64_t>&kernel_sizes, &strides, &paddings, &dilations, &groups;
  std::vector<std::string> acts, plans;
};

// Checks every convolution against the one before it; the first and the shortcut's, which is the
// last, against the image.
std::vector<ConvCall> check_convs(const char* op, const Image& image, const ConvLists& lists,
                                  bool has_shortcut);

struct BlockCall {
  std::vector<ConvCall> convs;  // as in BlockArgs
  bool has_shortcut;

  const ConvCall& last() const { return convs[convs.size() - 1 - has_shortcut]; }

  // The output, dense NHWC. image: 4-D, of the shape that was checked, any strides.
  Tensor run(const Tensor& image) const;
};

// The input of what follows a convolution.
InputShape output_shape(const ConvCall& call, ScalarType type);

// check_convs, and that the two paths can be added up.
BlockCall check_block(const char* op, const Image& image, const ConvLists& lists,
                      bool has_shortcut);

}  // namespace resnet_fused
