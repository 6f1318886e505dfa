// prepare and run_prepared: what a fused module calls again and again, with all its arguments
// checked once. A call of residual_block on a 4 x 4 map takes 30 us, most of it for its lists and
// their checks; this takes 10.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>

#include "cpu/block_call.h"
#include "cpu/content.h"
#include "op/op_string.h"
#include "op/registry.h"

namespace resnet_fused {
namespace {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using Strings = std::vector<StringHandle>;

struct Prepared {
  InputShape input;
  bool batched;
  BlockCall call;  // one convolution by itself where nothing is added
  bool adds, pool;
  ContentWatch watch;

  Tensor run(const Tensor& image) const {
    return adds ? call.run(image) : run_call(call.convs[0], image, std::nullopt, pool);
  }
};

Registry<Prepared>& registry() {
  static auto* const all = new Registry<Prepared>;
  return *all;
}

int64_t prepare(const Tensor& x, const Tensors& packed, const Tensors& scales,
                const Tensors& shifts, const Tensors& watched, const Ints& kernel_sizes,
                const Ints& strides, const Ints& paddings, const Ints& dilations,
                const Ints& groups, const Strings& acts, const Strings& plans, bool has_shortcut,
                bool adds, bool pool) {
  const char* op = "prepare";
  const ConvLists lists{packed,   scales,    shifts, kernel_sizes,       strides,
                        paddings, dilations, groups, take_strings(acts), take_strings(plans)};
  const Image image = check_image(op, x);
  check(adds || (packed.size() == 1 && !has_shortcut), op,
        ": packed must have one convolution where nothing is added, got ", packed.size());
  check(!(adds && pool), op, ": pool must be False where something is added, got True");
  const BlockCall call = adds ? check_block(op, image, lists, has_shortcut)
                              : BlockCall{check_convs(op, image, lists, false), false};
  for (const Tensor& tensor : watched) check_cpu(tensor, op, "watched");
  return registry().add(std::make_shared<Prepared>(
      Prepared{image.shape, image.batched, call, adds, pool, ContentWatch(watched)}));
}

bool same_input(const InputShape& a, const InputShape& b) {
  return a.type == b.type && a.batch == b.batch && a.channels == b.channels &&
         a.height == b.height && a.width == b.width;
}

std::optional<Tensor> run_prepared(const Tensor& x, const Tensors& watched, int64_t id) {
  const char* op = "run_prepared";
  const std::shared_ptr<const Prepared> prepared = registry().find(id);
  check(prepared != nullptr, op, ": prepared must be what prepare returned, not yet released, got ",
        id);
  prepared->watch.prefetch();
  const Image image = check_image(op, x);
  check(image.batched == prepared->batched && same_input(image.shape, prepared->input), op,
        ": x must have the shape and dtype that were prepared, got shape ", shape_text(x.sizes()),
        " and ", dtype_name(x.scalar_type()));
  if (!prepared->watch.holds(watched)) return std::nullopt;
  return image.like_input(prepared->run(image.x));
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
  m.impl("run_prepared", TORCH_BOX(&resnet_fused::run_prepared));
}
