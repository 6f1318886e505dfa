// global_avg_pool_linear_cuda: the mean over an image's map and a linear layer in one kernel, and
// which sizes it serves.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cuda/context.h"
#include "cuda/conv_arguments.h"
#include "cuda/dense.h"
#include "cuda/sm80/head.h"

namespace resnet_fused::cuda {
namespace {

constexpr const char* kOp = "global_avg_pool_linear_cuda";

// Dense rows at a multiple of 16 bytes.
Tensor dense_rows(const Tensor& tensor) {
  if (tensor.is_contiguous() && is_aligned(tensor)) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

std::tuple<Tensor, Tensor> global_avg_pool_linear(const Tensor& x, const Tensor& weight,
                                                  const MaybeTensor& bias) {
  check(x.dim() == 4, kOp, ": x must be 4-D (N, C, H, W), got shape ", shape_text(x.sizes()));
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, kOp,
        ": x must be float32, bfloat16 or float16, got ", dtype_name(type));
  check(weight.dim() == 2 && weight.size(1) == x.size(1), kOp,
        ": weight must be 2-D (outputs, inputs) with the ", x.size(1), " channels of x, got shape ",
        shape_text(weight.sizes()));
  check_like(kOp, "weight", weight, x, type);
  if (bias) {
    check_like(kOp, "bias", *bias, x, type);
    check_shape(*bias, Sizes{weight.size(0)}, kOp, "bias");
  }
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const sm80::HeadProblem p{x.size(0), x.size(2) * x.size(3), x.size(1), weight.size(0)};
  const Tensor pooled = empty_nhwc(x, {p.images, p.channels, 1, 1});
  const Tensor y = torch::stable::new_empty(x, {p.images, p.classes});
  const Tensor image = dense_image(x), rows = dense_rows(weight);
  const MaybeTensor terms = dense_vector(bias);
  sm80::Head operands{};
  operands.x = image.const_data_ptr();
  operands.weight = rows.const_data_ptr();
  operands.bias = pointer(terms);
  operands.pooled = pooled.mutable_data_ptr();
  operands.y = y.mutable_data_ptr();
  const sm80::Type kind = type == ScalarType::BFloat16 ? sm80::Type::kBFloat16
                          : type == ScalarType::Half   ? sm80::Type::kFloat16
                                                       : sm80::Type::kFloat32;
  const std::string failed = sm80::launch_head(p, kind, operands, current_stream(device));
  check(failed.empty(), kOp, ": ", failed);
  return {pooled, y};
}

// Empty where the kernel serves an x of this size, (N, C, H, W), and would be faster than
// PyTorch's two; else one sentence.
std::string refusal(const Sizes& x, int64_t classes, int64_t element_bytes) {
  check(x.size() == 4, "global_avg_pool_linear_refusal: x must be 4 sizes, got ", shape_text(x));
  return sm80::head_refuses({x[0], x[2] * x[3], x[1], classes},
                            element_bytes == 2 ? sm80::Type::kBFloat16 : sm80::Type::kFloat32);
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("global_avg_pool_linear_cuda", TORCH_BOX(&resnet_fused::cuda::global_avg_pool_linear));
}

// An op without a tensor argument has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("global_avg_pool_linear_refusal", TORCH_BOX(&resnet_fused::cuda::refusal));
}
