// A residual block, or a convolution, as an op receives it: its arguments, checked, and its run by
// their plans.
#pragma once

#include <vector>

#include "cpu/block.h"
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
  std::vector<ConvCall> convs;  // as in Block
  bool has_shortcut;
  bool adds = true, pool = false;  // as in Block

  const ConvCall& last() const { return convs[convs.size() - 1 - has_shortcut]; }

  // Whether kernels of ours compute all of it, for a batch that has images.
  bool is_ours() const;
  // The same on raw pointers, valid for as long as this lives; where it is_ours.
  Block raw() const;

  // The output, dense NHWC. image: 4-D, of the shape that was checked, any strides.
  Tensor run(const Tensor& image) const;
};

// The input of what follows a convolution.
InputShape output_shape(const ConvCall& call, ScalarType type);

// What follows the last block: the mean over its map where `pools`, and behind that the linear
// layer of `operands`, its weight and perhaps its bias.
struct HeadCall {
  bool pools;
  const std::vector<Tensor>& operands;
};

// Blocks of which each takes what the one before it returns, in one go: the output of the last one,
// or of the head. image: of the shape that the first one has, any strides.
Tensor run_blocks(const Tensor& image, std::vector<const Block*> blocks, const HeadCall& head);

// check_convs, and that the two paths can be added up.
BlockCall check_block(const char* op, const Image& image, const ConvLists& lists,
                      bool has_shortcut);

}  // namespace resnet_fused
