// conv_bn_act_cuda and add_relu_cuda. Schemas, fakes, autograd and autocast of all ops live in
// resnet_fused/ops.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/arguments.h"
#include "cuda/conv_launch.h"
#include "op/op_string.h"

namespace resnet_fused::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor conv_bn_act(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& shift,
                   const MaybeTensor& residual, const MaybeTensor& shortcut_x,
                   const MaybeTensor& shortcut_packed, const MaybeTensor& shortcut_scale,
                   const MaybeTensor& shortcut_shift, const IntPair& kernel_size,
                   const IntPair& stride, const IntPair& padding, const IntPair& dilation,
                   int64_t groups, StringHandle act_handle, const IntPair& shortcut_stride,
                   StringHandle config_handle) {
  const std::string act = take_string(act_handle), config = take_string(config_handle);
  const ConvArguments a{"conv_bn_act_cuda",
                        x,
                        packed,
                        scale,
                        shift,
                        residual,
                        shortcut_x,
                        shortcut_packed,
                        shortcut_scale,
                        shortcut_shift,
                        kernel_size,
                        stride,
                        padding,
                        dilation,
                        groups,
                        act,
                        shortcut_stride};
  const Sizes out = check_arguments(a);
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = launch(conv_of(a, out, config), x, residual, shortcut_x);
  return x.dim() == 4 ? y : torch::stable::squeeze(y, 0);
}

// ---- add_relu -----------------------------------------------------------------------------------

Tensor add_relu(const Tensor& a, const Tensor& b) {
  const char* const op = "add_relu_cuda";
  const sm80::Type kind = check_elements(op, "a", a);
  check_shape(b, a.sizes(), op, "b");
  check_like(op, "b", b, a, a.scalar_type(), "a");
  const int device = a.get_device_index();
  if (a.numel() == 0) return torch::stable::new_empty(a, a.sizes());
  const DeviceGuard guard(device);
  const Tensor y = torch::stable::empty_like(a);  // dense, in a's order of dimensions
  const Tensor left = with_layout(a, y), right = with_layout(b, y);
  const std::string failed = sm80::launch_add_relu(
      kind, left.const_data_ptr(), right.const_data_ptr(), y.mutable_data_ptr(), y.numel(),
      sm80_device(device_facts(device)), current_stream(device));
  check(failed.empty(), op, ": ", failed);
  return y;
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("conv_bn_act_cuda", TORCH_BOX(&resnet_fused::cuda::conv_bn_act));
  m.impl("add_relu_cuda", TORCH_BOX(&resnet_fused::cuda::add_relu));
}
