// bottleneck_tail_cuda: a convolution and the 1 x 1 convolution behind it in one kernel, and which
// ones it serves.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/arguments.h"
#include "cuda/context.h"
#include "cuda/conv_arguments.h"
#include "cuda/conv_problem.h"
#include "cuda/dense.h"
#include "cuda/sm80/tail.h"
#include "op/op_string.h"

namespace resnet_fused::cuda {
namespace {

constexpr const char* kOp = "bottleneck_tail_cuda";

// Of the second convolution. `sizes`: what comes out of the first, (N, C, H, W); becomes the shape
// of the result.
void check_last(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& shift,
                const MaybeTensor& residual, const std::string& act, Sizes& sizes) {
  const ScalarType type = x.scalar_type();
  check(scale.dim() == 1 && scale.numel() > 0, kOp,
        ": last_scale must be 1-D, one value per output channel, got shape ",
        shape_text(scale.sizes()));
  const int64_t channels = scale.numel();
  check_shape(packed, Sizes{channels, sizes[1], 1, 1}, kOp, "last_packed");
  check_like(kOp, "last_packed", packed, x, type);
  check_like(kOp, "last_scale", scale, x, ScalarType::Float);
  check_like(kOp, "last_shift", shift, x, ScalarType::Float);
  check_shape(shift, Sizes{channels}, kOp, "last_shift");
  check(act == "relu" || act == "none", kOp, ": last_act must be \"relu\" or \"none\", got \"", act,
        "\"");
  sizes[1] = channels;
  if (!residual) return;
  check_like(kOp, "residual", *residual, x, type);
  check_shape(*residual, Sizes(sizes.begin() + (x.dim() == 3), sizes.end()), kOp, "residual");
}

Tensor bottleneck_tail(const Tensor& x, const Tensor& packed, const Tensor& scale,
                       const Tensor& shift, const Tensor& last_packed, const Tensor& last_scale,
                       const Tensor& last_shift, const MaybeTensor& residual,
                       const IntPair& kernel_size, const IntPair& stride, const IntPair& padding,
                       const IntPair& dilation, StringHandle act_handle,
                       StringHandle last_act_handle) {
  const std::string act = take_string(act_handle), last_act = take_string(last_act_handle);
  const MaybeTensor none;
  const IntPair one{1, 1};
  Sizes sizes = check_arguments({kOp, x, packed, scale, shift, none, none, none, none, none,
                                 kernel_size, stride, padding, dilation, 1, act, one});
  check(x.scalar_type() != ScalarType::Float, kOp, ": x must be bfloat16 or float16, got float32");
  check_last(x, last_packed, last_scale, last_shift, residual, last_act, sizes);
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor y = empty_nhwc(x, sizes);
  if (y.numel() > 0) {
    const Tensor image = dense_image(x), weight = dense_image(packed);
    const Tensor last_weight = dense_image(last_packed);
    const Tensor factors = dense_vector(scale), terms = dense_vector(shift);
    const Tensor last_factors = dense_vector(last_scale), last_terms = dense_vector(last_shift);
    const MaybeTensor added = dense_image(residual);
    const sm80::TailProblem p{
        problem_of({sizes_of(image), scale.numel(), kernel_size, stride, padding, dilation}),
        int(std::min<int64_t>(last_scale.numel(), INT32_MAX))};
    const sm80::TailOperands operands{act == "relu",
                                      last_act == "relu",
                                      image.const_data_ptr(),
                                      weight.const_data_ptr(),
                                      floats(factors),
                                      floats(terms),
                                      last_weight.const_data_ptr(),
                                      floats(last_factors),
                                      floats(last_terms),
                                      pointer(added),
                                      y.mutable_data_ptr()};
    const std::string failed =
        sm80::launch_tail(p, check_elements(kOp, "x", x), operands, current_stream(device));
    check(failed.empty(), kOp, ": ", failed);
  }
  return x.dim() == 4 ? y : torch::stable::squeeze(y, 0);
}

// Empty where the kernel serves an x of this size, (N, C, H, W), else one sentence.
std::string refusal(const Sizes& x, int64_t between, int64_t channels, const IntPair& kernel_size,
                    const IntPair& stride, const IntPair& padding, const IntPair& dilation) {
  check(x.size() == 4, "bottleneck_tail_refusal: x must be 4 sizes, got ", shape_text(x));
  return sm80::tail_refuses({problem_of({x, between, kernel_size, stride, padding, dilation}),
                             int(std::min<int64_t>(channels, INT32_MAX))});
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("bottleneck_tail_cuda", TORCH_BOX(&resnet_fused::cuda::bottleneck_tail));
}

// An op without a tensor argument has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("bottleneck_tail_refusal", TORCH_BOX(&resnet_fused::cuda::refusal));
}
