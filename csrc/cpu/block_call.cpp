#include "cpu/block_call.h"

#include <algorithm>

#include "cpu/chain.h"

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

bool BlockCall::is_ours() const {
  return std::all_of(convs.begin(), convs.end(), [](const ConvCall& conv) {
    return conv.plan != Plan::kTorch && conv.shape.out_pixels() > 0;
  });
}

Block BlockCall::raw() const {
  Block block{convs[0].dtype, {}, has_shortcut, adds, pool};
  block.convs.reserve(convs.size());
  for (const ConvCall& conv : convs) {
    const Tensor& packed = conv.packed;
    block.convs.push_back({conv.shape, conv.plan, conv.relu, floats(packed), floats(conv.scale),
                           floats(conv.shift),
                           packed.numel() * static_cast<int64_t>(packed.element_size())});
  }
  return block;
}

Tensor BlockCall::run(const Tensor& image) const {
  if (is_ours()) {
    const Block block = raw();
    return run_blocks(image, {&block}, {false, {}});
  }
  return adds ? run_singly(convs, has_shortcut, image)
              : run_call(convs[0], image, std::nullopt, pool);
}

Tensor run_blocks(const Tensor& image, std::vector<const Block*> blocks, const HeadCall& head) {
  const Block& first = *blocks.front();
  const ConvShape& last = blocks.back()->last();
  const Tensor x = to_nhwc(image);
  const int64_t h = last.out_h(), w = last.out_w(), images = last.batch;
  ChainArgs chain{std::move(blocks), {}, {}, x.const_data_ptr(), nullptr};
  const auto run = [&](const Tensor& y) {
    chain.y = y.mutable_data_ptr();
    run_chain(chain);
    return y;
  };
  const bool pool = chain.blocks.back()->pool;
  if (!head.pools) {
    return run(
        empty_nhwc(x, images, last.out_channels, pool ? pooled(h) : h, pool ? pooled(w) : w));
  }
  const int64_t pixels = pool ? pooled(h) * pooled(w) : h * w;
  chain.mean = MeanArgs{first.dtype, pixels, last.out_channels, nullptr, nullptr};
  if (head.operands.empty()) return run(empty_nhwc(x, images, last.out_channels, 1, 1));
  const Tensor weight = dense(head.operands[0]);
  std::optional<Tensor> bias;
  if (head.operands.size() > 1) bias = dense(head.operands[1]);
  const int64_t outputs = weight.size(0);
  chain.linear = LinearArgs{first.dtype,
                            images,
                            last.out_channels,
                            outputs,
                            nullptr,
                            weight.const_data_ptr(),
                            bias ? bias->const_data_ptr() : nullptr,
                            nullptr};
  return run(torch::stable::new_empty(x, {images, outputs}));
}

}  // namespace resnet_fused
