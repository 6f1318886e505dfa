#include "cpu/block_call.h"

#include "cpu/block.h"
#include "op/op_string.h"

namespace resnet_fused {
namespace {

using Ints = std::vector<int64_t>;

void check_count(const char* op, const char* name, size_t count, size_t each, size_t convs) {
  check(count == each * convs, op, ": ", name, " must have ", each == 1 ? "one" : "two",
        " for each of the ", convs, " convolutions, got ", count);
}

// (C, H, W) or (N, C, H, W), as the op's x was given.
Ints sizes_of(const InputShape& s, bool batched) {
  Ints sizes{s.batch, s.channels, s.height, s.width};
  if (!batched) sizes.erase(sizes.begin());
  return sizes;
}

// What is added must have the main path's shape.
void check_addition(const char* op, const InputShape& shortcut, const InputShape& main,
                    bool has_shortcut, bool batched) {
  const Ints got = sizes_of(shortcut, batched), expected = sizes_of(main, batched);
  if (got == expected) return;
  fail(op, ": ", has_shortcut ? "the shortcut's output" : "x, added as it is,",
       " must have the main path's shape ", shape_text(expected), ", got ", shape_text(got));
}

// What lies between the convolutions has no tensor whose allocation would refuse absurd sizes.
void check_size(const OpName& op, const ConvCall& call) {
  const ConvShape& s = call.shape;
  int64_t bytes = 4;
  bool fits = true;
  for (const int64_t size : {s.batch, s.out_channels, s.out_h(), s.out_w()}) {
    fits = fits && !__builtin_mul_overflow(bytes, size, &bytes);
  }
  check(fits && bytes < int64_t{1} << 60, op,
        ": the output must have fewer than 2^60 bytes, got shape ",
        shape_text(Ints{s.batch, s.out_channels, s.out_h(), s.out_w()}));
}

const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}

Tensor run_at_once(const std::vector<ConvCall>& calls, bool has_shortcut, const Tensor& image) {
  std::vector<BlockConv> convs;
  convs.reserve(calls.size());
  for (const ConvCall& call : calls) {
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

}  // namespace

InputShape output_shape(const ConvCall& call, ScalarType type) {
  const ConvShape& s = call.shape;
  return {type, call.dtype, s.batch, s.out_channels, s.out_h(), s.out_w()};
}

std::vector<ConvCall> check_convs(const char* op, const Image& image, const ConvLists& lists,
                                  bool has_shortcut) {
  const size_t count = lists.packed.size(), least = has_shortcut ? 2 : 1;
  check(count >= least, op, ": packed must have at least ", least,
        has_shortcut ? " convolutions" : " convolution", ", got ", count);
  check_count(op, "scales", lists.scales.size(), 1, count);
  check_count(op, "shifts", lists.shifts.size(), 1, count);
  check_count(op, "kernel_sizes", lists.kernel_sizes.size(), 2, count);
  check_count(op, "strides", lists.strides.size(), 2, count);
  check_count(op, "paddings", lists.paddings.size(), 2, count);
  check_count(op, "dilations", lists.dilations.size(), 2, count);
  check_count(op, "groups", lists.groups.size(), 1, count);
  check_count(op, "acts", lists.acts.size(), 1, count);
  check_count(op, "plans", lists.plans.size(), 1, count);

  std::vector<ConvCall> calls;
  calls.reserve(count);
  InputShape input = image.shape;
  for (size_t i = 0; i < count; ++i) {
    const OpName name{op, static_cast<int64_t>(i)};
    const bool on_shortcut = has_shortcut && i + 1 == count;
    const size_t pair = 2 * i;
    calls.push_back(check_conv(
        name, on_shortcut ? image.shape : input, lists.packed[i], lists.scales[i], lists.shifts[i],
        {&lists.kernel_sizes[pair], &lists.strides[pair], &lists.paddings[pair],
         &lists.dilations[pair], lists.groups[i], lists.acts[i], lists.plans[i]}));
    check_size(name, calls.back());
    if (!on_shortcut) input = output_shape(calls.back(), image.shape.type);
  }
  return calls;
}

BlockCall check_block(const char* op, const Image& image, const ConvLists& lists,
                      bool has_shortcut) {
  BlockCall block{check_convs(op, image, lists, has_shortcut), has_shortcut};
  check_addition(op,
                 has_shortcut ? output_shape(block.convs.back(), image.shape.type) : image.shape,
                 output_shape(block.last(), image.shape.type), has_shortcut, image.batched);
  return block;
}

Tensor BlockCall::run(const Tensor& image) const {
  bool at_once = image.size(0) > 0;
  for (const ConvCall& conv : convs) at_once = at_once && conv.plan != Plan::kTorch;
  return at_once ? run_at_once(convs, has_shortcut, image) : run_singly(convs, has_shortcut, image);
}

}  // namespace resnet_fused
