// scale_shift_act_cuda: y = act(x * scale + shift + residual), channel by channel.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/arguments.h"
#include "cuda/context.h"
#include "cuda/dense.h"
#include "cuda/sm80/scale_shift.h"
#include "op/op_string.h"

namespace resnet_fused::cuda {
namespace {

constexpr const char* kOp = "scale_shift_act_cuda";

Tensor scale_shift_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                       const MaybeTensor& residual, StringHandle act_handle) {
  const std::string act = take_string(act_handle);
  check(x.dim() == 3 || x.dim() == 4, kOp,
        ": x must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape ", shape_text(x.sizes()));
  const sm80::Type kind = check_elements(kOp, "x", x);
  const Sizes channels{x.size(x.dim() - 3)};
  check_like(kOp, "scale", scale, x, ScalarType::Float);
  check_shape(scale, channels, kOp, "scale");
  check_like(kOp, "shift", shift, x, ScalarType::Float);
  check_shape(shift, channels, kOp, "shift");
  if (residual) {
    check_like(kOp, "residual", *residual, x, x.scalar_type());
    check_shape(*residual, x.sizes(), kOp, "residual");
  }
  check(act == "relu" || act == "none", kOp, ": act must be \"relu\" or \"none\", got \"", act,
        "\"");

  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool batched = x.dim() == 4;
  Sizes sizes(x.sizes().begin(), x.sizes().end());
  if (!batched) sizes.insert(sizes.begin(), 1);
  const Tensor y = empty_nhwc(x, sizes);
  if (x.numel() > 0) {
    const Tensor image = dense_image(x), factors = dense_vector(scale), terms = dense_vector(shift);
    const MaybeTensor added = dense_image(residual);
    const sm80::ScaleShift call{image.const_data_ptr(), pointer(added),       floats(factors),
                                floats(terms),          y.mutable_data_ptr(), x.numel(),
                                int(channels[0]),       act == "relu",        false};
    const std::string failed = sm80::launch_scale_shift(
        kind, call, sm80_device(device_facts(device)), current_stream(device));
    check(failed.empty(), kOp, ": ", failed);
  }
  return batched ? y : torch::stable::squeeze(y, 0);
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("scale_shift_act_cuda", TORCH_BOX(&resnet_fused::cuda::scale_shift_act));
}
