// residual_block and set_block_budget.
#include <torch/csrc/stable/library.h>

#include "cpu/block.h"
#include "cpu/block_call.h"
#include "op/op_string.h"

namespace resnet_fused {
namespace {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using Strings = std::vector<StringHandle>;

Tensor residual_block(const Tensor& x, const Tensors& packed, const Tensors& scales,
                      const Tensors& shifts, const Ints& kernel_sizes, const Ints& strides,
                      const Ints& paddings, const Ints& dilations, const Ints& groups,
                      const Strings& acts, const Strings& plans, bool has_shortcut) {
  const char* op = "residual_block";
  const ConvLists lists{packed,   scales,    shifts, kernel_sizes,       strides,
                        paddings, dilations, groups, take_strings(acts), take_strings(plans)};
  const Image image = check_image(op, x);
  return image.like_input(check_block(op, image, lists, has_shortcut).run(image.x));
}

void set_budget(int64_t bytes) {
  check(bytes >= 0, "set_block_budget: bytes must be at least 0, got ", bytes);
  set_block_budget(bytes);
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("residual_block", TORCH_BOX(&resnet_fused::residual_block));
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("set_block_budget", TORCH_BOX(&resnet_fused::set_budget));
}
