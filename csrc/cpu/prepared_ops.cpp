// prepare, prepare_chain and run_prepared: what fused modules call again and again, with all
// arguments checked once. A call of residual_block on a 4 x 4 map takes 30 us, most of it for its
// lists and their checks; this takes 10. Within a net it takes more: the weights of one block push
// the code and data of the next call out of the caches, so a chain of blocks is one call (chain.h).
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "cpu/block_call.h"
#include "cpu/head_call.h"
#include "cpu/pool.h"
#include "op/op_string.h"
#include "op/registry.h"

namespace resnet_fused {
namespace {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using Strings = std::vector<StringHandle>;

// A residual block or a convolution.
struct Step {
  BlockCall call;
  std::optional<Block> raw;  // where kernels of ours compute it

  explicit Step(BlockCall checked) : call(std::move(checked)) {
    if (call.is_ours()) raw = call.raw();
  }
};

// What follows the last block.
struct Head {
  bool pools, linear, bias;  // linear: behind the pool, with operands given at every call
};

struct Prepared {
  InputShape input, output;  // output: before the head
  bool batched;
  std::vector<Step> steps;  // each takes what the one before it returns
  Head head;

  // operands: of the linear layer, weight and perhaps bias.
  // Steps of ours that follow each other go at once, up to the end with the head.
  Tensor run(const Tensor& image, const Tensors& operands) const {
    Tensor y = image;
    for (auto step = steps.begin(); step != steps.end();) {
      std::vector<const Block*> blocks;
      const auto begin = step;
      for (; step != steps.end() && step->raw; ++step) blocks.push_back(&*step->raw);
      if (step == begin) {
        y = (step++)->call.run(y);
      } else if (step != steps.end()) {
        y = run_blocks(y, std::move(blocks), {false, {}});
      } else {
        return run_blocks(y, std::move(blocks), {head.pools, operands});
      }
    }
    if (head.pools) y = run_global_avg_pool(output.dtype, y);
    if (!head.linear) return y;
    return run_linear(output.dtype, y, output.batch, operands[0],
                      head.bias ? std::optional<Tensor>(operands[1]) : std::nullopt);
  }
};

Registry<Prepared>& registry() {
  static auto* const all = new Registry<Prepared>;
  return *all;
}

bool same_input(const InputShape& a, const InputShape& b) {
  return a.type == b.type && a.batch == b.batch && a.channels == b.channels &&
         a.height == b.height && a.width == b.width;
}

InputShape output_of(const Step& step, ScalarType type) {
  InputShape y = output_shape(step.call.last(), type);
  if (step.call.pool) y.height = pooled(y.height), y.width = pooled(y.width);
  return y;
}

std::shared_ptr<const Prepared> find(const OpName& op, const char* name, int64_t id) {
  std::shared_ptr<const Prepared> prepared = registry().find(id);
  check(prepared != nullptr, op, ": ", name,
        " must be what prepare returned, not yet released, got ", id);
  return prepared;
}

int64_t prepare(const Tensor& x, const Tensors& packed, const Tensors& scales,
                const Tensors& shifts, const Ints& kernel_sizes, const Ints& strides,
                const Ints& paddings, const Ints& dilations, const Ints& groups,
                const Strings& acts, const Strings& plans, bool has_shortcut, bool adds,
                bool pool) {
  const char* op = "prepare";
  const ConvLists lists{packed,   scales,    shifts, kernel_sizes,       strides,
                        paddings, dilations, groups, take_strings(acts), take_strings(plans)};
  const Image image = check_image(op, x);
  check(adds || (packed.size() == 1 && !has_shortcut), op,
        ": packed must have one convolution where nothing is added, got ", packed.size());
  check(!(adds && pool), op, ": pool must be False where something is added, got True");
  const Step step(adds ? check_block(op, image, lists, has_shortcut)
                       : BlockCall{check_convs(op, image, lists, false), false, false, pool});
  return registry().add(std::make_shared<Prepared>(
      Prepared{image.shape, output_of(step, image.shape.type), image.batched, {step}, Head{}}));
}

// operands: of a linear layer behind the pool of an output of `shape`.
void check_linear(const char* op, const InputShape& shape, const Head& head,
                  const Tensors& operands) {
  check(head.pools, op, ": linear must be empty without a pool before it, got ", operands.size(),
        " tensors");
  check(operands.size() <= 2, op, ": linear must be a weight, or weight and bias, got ",
        operands.size(), " tensors");
  for (const Tensor& tensor : operands) {
    check_cpu(tensor, op, "linear");
    check_dtype(tensor, shape.type, op, "linear");
  }
  const Tensor& weight = operands[0];
  check(weight.dim() == 2 && weight.size(1) == shape.channels, op,
        ": linear must begin with a 2-D weight (outputs, ", shape.channels, "), got shape ",
        shape_text(weight.sizes()));
  if (head.bias) check_shape(operands[1], Ints{weight.size(0)}, op, "linear's bias");
}

// Several in one, each of which gets what the one before it returns, the first an input like x;
// none where they do not follow one another. What is watched is what they watch, and the operands
// of `linear`. pools: with the average over the map behind the last; linear: and a linear layer,
// its weight and perhaps its bias.
std::optional<int64_t> prepare_chain(const Tensor& x, const Ints& prepared, bool pools,
                                     const Tensors& linear) {
  const char* op = "prepare_chain";
  const Image image = check_image(op, x);
  check(!prepared.empty(), op, ": prepared must not be empty");
  InputShape shape = image.shape;
  std::vector<Step> steps;
  for (const int64_t id : prepared) {
    const auto part = find(op, "each of prepared", id);
    check(!part->head.pools, op, ": each of prepared must be what prepare returned, got a chain");
    if (part->batched != image.batched || !same_input(part->input, shape)) return std::nullopt;
    steps.insert(steps.end(), part->steps.begin(), part->steps.end());
    shape = part->output;
  }
  const Head head{pools, !linear.empty(), linear.size() == 2};
  const bool can_pool = image.batched && shape.height * shape.width > 0;
  check(!pools || (can_pool && shape.dtype != DType::kFloat64), op,
        ": pools must be False but for a batch of images with pixels, not in float64, got True");
  if (head.linear) check_linear(op, shape, head, linear);
  return registry().add(std::make_shared<Prepared>(
      Prepared{image.shape, shape, image.batched, std::move(steps), head}));
}

Tensor run_prepared(const Tensor& x, int64_t id, const Tensors& linear) {
  const char* op = "run_prepared";
  const auto prepared = find(op, "prepared", id);
  const Image image = check_image(op, x);
  check(image.batched == prepared->batched && same_input(image.shape, prepared->input), op,
        ": x must have the shape and dtype that were prepared, got shape ", shape_text(x.sizes()),
        " and ", dtype_name(x.scalar_type()));
  const size_t operands = prepared->head.linear + prepared->head.bias;
  check(linear.size() == operands, op, ": linear must have the ", operands,
        " tensors that were prepared, got ", linear.size());
  if (operands > 0) check_linear(op, prepared->output, prepared->head, linear);
  return image.like_input(prepared->run(image.x, linear));
}

}  // namespace
}  // namespace resnet_fused

// Forgets what prepare returned. No op: finalizers call it, and those run at any moment, under
// whatever traces or redirects ops just then.
extern "C" __attribute__((visibility("default"))) void resnet_fused_release_prepared(int64_t id) {
  resnet_fused::registry().remove(id);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("prepare", TORCH_BOX(&resnet_fused::prepare));
  m.impl("prepare_chain", TORCH_BOX(&resnet_fused::prepare_chain));
  m.impl("run_prepared", TORCH_BOX(&resnet_fused::run_prepared));
}
