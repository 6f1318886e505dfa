// residual_block and set_block_budget.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/block.h"
#include "cpu/conv_call.h"
#include "cpu/op_string.h"

namespace resnet_fused {
namespace {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

constexpr const char* kOp = "residual_block";

void check_count(const char* name, size_t count, size_t each, size_t convs) {
  check(count == each * convs, kOp, ": ", name, " must have ", each == 1 ? "one" : "two",
        " for each of the ", convs, " convolutions, got ", count);
}

// The input of what follows a convolution.
InputShape output_shape(const ConvCall& call, ScalarType type) {
  const ConvShape& s = call.shape;
  return {type, call.dtype, s.batch, s.out_channels, s.out_h(), s.out_w()};
}

// (C, H, W) or (N, C, H, W), as the op's x was given.
Ints sizes_of(const InputShape& s, bool batched) {
  Ints sizes{s.batch, s.channels, s.height, s.width};
  if (!batched) sizes.erase(sizes.begin());
  return sizes;
}

// What is added must have the main path's shape.
void check_addition(const InputShape& shortcut, const InputShape& main, bool has_shortcut,
                    bool batched) {
  const Ints got = sizes_of(shortcut, batched), expected = sizes_of(main, batched);
  if (got == expected) return;
  fail(kOp, ": ", has_shortcut ? "the shortcut's output" : "x, added as it is,",
       " must have the main path's shape ", shape_text(expected), ", got ", shape_text(got));
}

// What lies between the convolutions has no tensor whose allocation would refuse absurd sizes.
void check_size(const ConvCall& call, int64_t index) {
  const ConvShape& s = call.shape;
  int64_t bytes = 4;
  bool fits = true;
  for (const int64_t size : {s.batch, s.out_channels, s.out_h(), s.out_w()}) {
    fits = fits && !__builtin_mul_overflow(bytes, size, &bytes);
  }
  check(fits && bytes > 0 && bytes < int64_t{1} << 60, OpName(kOp, index),
        ": the output must have fewer than 2^60 bytes, got shape ",
        shape_text(Ints{s.batch, s.out_channels, s.out_h(), s.out_w()}));
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

Tensor run_block_on(const std::vector<ConvCall>& calls, bool has_shortcut, const Tensor& image) {
  std::vector<BlockConv> convs;
  convs.reserve(calls.size());
  for (const ConvCall& call : calls) {
    check_size(call, static_cast<int64_t>(convs.size()));
    const Tensor& packed = call.packed;
    convs.push_back({call.shape, call.plan, call.relu, floats(packed), floats(call.scale),
                     floats(call.shift),
                     packed.numel() * static_cast<int64_t>(packed.element_size())});
  }
  const int64_t main = static_cast<int64_t>(calls.size()) - has_shortcut;
  const ConvShape& last = convs[static_cast<size_t>(main - 1)].shape;
  const Tensor x = to_nhwc(image);
  const Tensor y = empty_nhwc(x, last.batch, last.out_channels, last.out_h(), last.out_w());
  run_block(
      {calls[0].dtype, convs.data(), main, has_shortcut, x.const_data_ptr(), y.mutable_data_ptr()});
  return y;
}

// One convolution after the other: what PyTorch's own needs, which takes tensors.
Tensor run_singly(const std::vector<ConvCall>& calls, bool has_shortcut, const Tensor& image) {
  const Tensor x = to_nhwc(image);
  const Tensor shortcut = has_shortcut ? run_call(calls.back(), x, std::nullopt) : x;
  const size_t last = calls.size() - 1 - has_shortcut;
  Tensor y = x;
  for (size_t i = 0; i < last; ++i) y = run_call(calls[i], y, std::nullopt);
  return run_call(calls[last], y, shortcut);
}

Tensor residual_block(const Tensor& x, const Tensors& packed, const Tensors& scales,
                      const Tensors& shifts, const Ints& kernel_sizes, const Ints& strides,
                      const Ints& paddings, const Ints& dilations, const Ints& groups,
                      const std::vector<StringHandle>& acts, const std::vector<StringHandle>& plans,
                      bool has_shortcut) {
  std::vector<std::string> act_names, plan_names;
  for (StringHandle act : acts) act_names.push_back(take_string(act));
  for (StringHandle plan : plans) plan_names.push_back(take_string(plan));
  const size_t count = packed.size(), least = has_shortcut ? 2 : 1;
  const Image image = check_image(kOp, x);
  check(count >= least, kOp, ": packed must have at least ", least,
        has_shortcut ? " convolutions" : " convolution", ", got ", count);
  check_count("scales", scales.size(), 1, count);
  check_count("shifts", shifts.size(), 1, count);
  check_count("kernel_sizes", kernel_sizes.size(), 2, count);
  check_count("strides", strides.size(), 2, count);
  check_count("paddings", paddings.size(), 2, count);
  check_count("dilations", dilations.size(), 2, count);
  check_count("groups", groups.size(), 1, count);
  check_count("acts", acts.size(), 1, count);
  check_count("plans", plans.size(), 1, count);

  std::vector<ConvCall> calls;
  calls.reserve(count);
  InputShape input = image.shape;
  bool ours = true;
  for (size_t i = 0; i < count; ++i) {
    const bool on_shortcut = has_shortcut && i + 1 == count;
    const size_t pair = 2 * i;
    calls.push_back(check_conv({kOp, static_cast<int64_t>(i)}, on_shortcut ? image.shape : input,
                               packed[i], scales[i], shifts[i],
                               {&kernel_sizes[pair], &strides[pair], &paddings[pair],
                                &dilations[pair], groups[i], act_names[i], plan_names[i]}));
    ours = ours && calls[i].plan != Plan::kTorch;
    if (!on_shortcut) input = output_shape(calls[i], image.shape.type);
  }
  check_addition(has_shortcut ? output_shape(calls.back(), image.shape.type) : image.shape, input,
                 has_shortcut, image.batched);
  const bool empty = image.shape.batch == 0;
  return image.like_input(ours && !empty ? run_block_on(calls, has_shortcut, image.x)
                                         : run_singly(calls, has_shortcut, image.x));
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
