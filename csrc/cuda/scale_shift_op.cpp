// scale_shift_act_cuda: y = act(x * scale + shift + residual), channel by channel.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/context.h"
#include "cuda/dense.h"
#include "cuda/sm80/scale_shift.h"
#include "op/op_string.h"

namespace resnet_fused::cuda {
namespace {

constexpr const char* kOp = "scale_shift_act_cuda";

void check_place(const Tensor& tensor, const Tensor& x, ScalarType type, const char* name) {
  check_dtype(tensor, type, kOp, name);
  check(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), kOp, ": ", name,
        " must be on cuda:", x.get_device_index(), ", where x is, got another device");
}

Tensor scale_shift_act(const Tensor& x, const Tensor& scale, const Tensor& shift,
                       const MaybeTensor& residual, StringHandle act_handle) {
  const std::string act = take_string(act_handle);
  check(x.dim() == 3 || x.dim() == 4, kOp,
        ": x must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape ", shape_text(x.sizes()));
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, kOp,
        ": x must be float32, bfloat16 or float16, got ", dtype_name(type));
  const Sizes channels{x.size(x.dim() - 3)};
  check_place(scale, x, ScalarType::Float, "scale");
  check_shape(scale, channels, kOp, "scale");
  check_place(shift, x, ScalarType::Float, "shift");
  check_shape(shift, channels, kOp, "shift");
  if (residual) {
    check_place(*residual, x, type, "residual");
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
    const sm80::ScaleShift call{image.const_data_ptr(),
                                pointer(added),
                                static_cast<const float*>(factors.const_data_ptr()),
                                static_cast<const float*>(terms.const_data_ptr()),
                                y.mutable_data_ptr(),
                                x.numel(),
                                int(channels[0]),
                                act == "relu",
                                false};
    const sm80::Type kind = type == ScalarType::BFloat16 ? sm80::Type::kBFloat16
                            : type == ScalarType::Half   ? sm80::Type::kFloat16
                                                         : sm80::Type::kFloat32;
    const DeviceFacts& facts = device_facts(device);
    const std::string failed = sm80::launch_scale_shift(
        kind, call, {facts.multiprocessors, facts.shared_bytes}, current_stream(device));
    check(failed.empty(), kOp, ": ", failed);
  }
  return batched ? y : torch::stable::squeeze(y, 0);
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("scale_shift_act_cuda", TORCH_BOX(&resnet_fused::cuda::scale_shift_act));
}
