// prepare_cuda and run_prepared_cuda: a residual block or a convolution as one op, with arguments
// checked and weights made dense once. A call of a block with two convolutions takes the host 51 us
// where its ops are called one by one, 21 so (on the null device of the tests, which computes
// nothing).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/arguments.h"
#include "cuda/conv_launch.h"
#include "op/op_string.h"
#include "op/registry.h"

namespace resnet_fused::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using Strings = std::vector<StringHandle>;

constexpr const char* kRun = "run_prepared_cuda";

struct Prepared {
  Sizes input;  // (N, C, H, W)
  ScalarType type;
  int device;
  std::vector<Conv> main;        // one after the other
  std::optional<Conv> shortcut;  // what is added, computed by itself
  bool joined = false;           // the last of `main` computes the shortcut, too
  bool adds = false, pool = false;

  Tensor run(const Tensor& x) const {
    if (pool) return launch_with_pool(main[0], x);
    Tensor y = x;
    for (size_t i = 0; i + 1 < main.size(); ++i) y = launch(main[i], y, {}, {});
    if (joined) return launch(main.back(), y, {}, x);
    MaybeTensor residual;
    if (shortcut) {
      residual = launch(*shortcut, x, {}, {});
    } else if (adds) {
      residual = x;
    }
    return launch(main.back(), y, residual, {});
  }
};

Registry<Prepared>& registry() {
  static auto* const all = new Registry<Prepared>;
  return *all;
}

// All convolutions, main path first: pairs of integers lie one after the other.
struct Lists {
  const Tensors &packed, &scales, &shifts;
  const Ints &kernel_sizes, &strides, &paddings, &dilations, &groups;
  std::vector<std::string> acts, configs;

  size_t count() const { return packed.size(); }
  static IntPair pair(const Ints& all, size_t i) { return {all[2 * i], all[2 * i + 1]}; }
};

void check_lists(const char* op, const Lists& lists) {
  const auto check_length = [&](const char* name, size_t length, size_t each) {
    check(length == each * lists.count(), op, ": ", name, " must have ", each, " for each of the ",
          lists.count(), " convolutions, got ", length);
  };
  check(lists.count() > 0, op, ": packed must have a convolution, got none");
  check_length("scales", lists.scales.size(), 1);
  check_length("shifts", lists.shifts.size(), 1);
  check_length("kernel_sizes", lists.kernel_sizes.size(), 2);
  check_length("strides", lists.strides.size(), 2);
  check_length("paddings", lists.paddings.size(), 2);
  check_length("dilations", lists.dilations.size(), 2);
  check_length("groups", lists.groups.size(), 1);
  check_length("acts", lists.acts.size(), 1);
  check_length("configs", lists.configs.size(), 1);
}

// Convolution i of an image x, to which `residual` is added, or `branch`, convolved by convolution
// `shortcut` in the same kernel.
Conv conv_at(const char* op, const Lists& lists, size_t i, const Tensor& x,
             const MaybeTensor& residual, const MaybeTensor& branch, size_t shortcut, bool pool) {
  const MaybeTensor none;
  const MaybeTensor packed = branch ? MaybeTensor(lists.packed[shortcut]) : none;
  const MaybeTensor scale = branch ? MaybeTensor(lists.scales[shortcut]) : none;
  const MaybeTensor shift = branch ? MaybeTensor(lists.shifts[shortcut]) : none;
  const IntPair kernel_size = Lists::pair(lists.kernel_sizes, i);
  const IntPair stride = Lists::pair(lists.strides, i), padding = Lists::pair(lists.paddings, i);
  const IntPair dilation = Lists::pair(lists.dilations, i);
  const IntPair branch_stride = branch ? Lists::pair(lists.strides, shortcut) : IntPair{1, 1};
  const ConvArguments a{
      op,      x,        lists.packed[i], lists.scales[i], lists.shifts[i], residual,
      branch,  packed,   scale,           shift,           kernel_size,     stride,
      padding, dilation, lists.groups[i], lists.acts[i],   branch_stride};
  const Sizes out = check_arguments(a);
  Conv conv = pool ? pooled_conv_of(a, out) : conv_of(a, out, lists.configs[i]);
  conv.op = kRun;  // which launches it
  return conv;
}

int64_t prepare(const Tensor& x, const Tensors& packed, const Tensors& scales,
                const Tensors& shifts, const Ints& kernel_sizes, const Ints& strides,
                const Ints& paddings, const Ints& dilations, const Ints& groups,
                const Strings& acts, const Strings& configs, bool has_shortcut, bool joined,
                bool adds, bool pool) {
  const char* const op = "prepare_cuda";
  const Lists lists{packed,   scales,    shifts, kernel_sizes,       strides,
                    paddings, dilations, groups, take_strings(acts), take_strings(configs)};
  check(x.dim() == 4, op, ": x must be 4-D (N, C, H, W), got shape ", shape_text(x.sizes()));
  check_lists(op, lists);
  const size_t count = lists.count(), main = count - has_shortcut;
  check(main > 0, op, ": packed must have a convolution beside the shortcut's, got ", count);
  check(adds || !has_shortcut, op, ": has_shortcut must be False where nothing is added, got True");
  check(has_shortcut || !joined, op, ": joined must be False without a shortcut, got True");
  check(!pool || count == 1, op, ": pool must be False for ", count, " convolutions, got True");
  check(!pool || !adds, op, ": pool must be False where something is added, got True");
  if (joined) {
    const size_t last = count - 1;
    const IntPair none{0, 0}, one{1, 1};
    check(Lists::pair(lists.paddings, last) == none && Lists::pair(lists.dilations, last) == one &&
              lists.groups[last] == 1 && lists.acts[last] == "none",
          op,
          ": the shortcut must have padding 0, dilation 1, groups 1 and act \"none\" to be joined");
  }
  check_device(op, "x", x);
  const int device = x.get_device_index();
  const DeviceGuard guard(device);
  auto made = std::make_shared<Prepared>();
  made->input = sizes_of(x);
  made->type = x.scalar_type();
  made->device = device;
  made->joined = joined;
  made->adds = adds;
  made->pool = pool;
  Tensor y = x;  // of the right shape, whatever it holds
  for (size_t i = 0; i + 1 < main; ++i) {
    made->main.push_back(conv_at(op, lists, i, y, {}, {}, 0, false));
    y = empty_nhwc(x, made->main.back().out);
  }
  MaybeTensor residual, branch;
  if (joined) {
    branch = x;
  } else if (has_shortcut) {
    made->shortcut = conv_at(op, lists, count - 1, x, {}, {}, 0, false);
    residual = empty_nhwc(x, made->shortcut->out);
  } else if (adds) {
    residual = x;
  }
  made->main.push_back(conv_at(op, lists, main - 1, y, residual, branch, count - 1, pool));
  return registry().add(std::move(made));
}

Tensor run_prepared(const Tensor& x, int64_t id) {
  const std::shared_ptr<const Prepared> prepared = registry().find(id);
  check(prepared != nullptr, kRun,
        ": prepared must be what prepare_cuda returned, not yet released, got ", id);
  const auto sizes = x.sizes();
  check(std::equal(sizes.begin(), sizes.end(), prepared->input.begin(), prepared->input.end()) &&
            x.scalar_type() == prepared->type && x.is_cuda() &&
            x.get_device_index() == prepared->device,
        kRun, ": x must have the shape, dtype and device that were prepared, got shape ",
        shape_text(sizes), ", ", dtype_name(x.scalar_type()), " and ", device_text(x));
  const DeviceGuard guard(prepared->device);
  return prepared->run(x);
}

}  // namespace
}  // namespace resnet_fused::cuda

// Forgets what prepare_cuda returned. No op: finalizers call it, and those run at any moment, under
// whatever traces or redirects ops just then.
extern "C" __attribute__((visibility("default"))) void resnet_fused_release_prepared_cuda(
    int64_t id) {
  resnet_fused::cuda::registry().remove(id);
}

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("prepare_cuda", TORCH_BOX(&resnet_fused::cuda::prepare));
  m.impl("run_prepared_cuda", TORCH_BOX(&resnet_fused::cuda::run_prepared));
}
