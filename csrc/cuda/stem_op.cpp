// conv_bn_act_pool_cuda: y = maxpool3x3/2(act(conv(x) * scale + shift)) in one kernel, and which
// convolutions it serves.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/op_string.h"
#include "cuda/context.h"
#include "cuda/conv_arguments.h"
#include "cuda/conv_problem.h"
#include "cuda/dense.h"
#include "cuda/sm80/stem.h"
#ifndef RESNET_FUSED_WITHOUT_SM90
#include "cuda/sm90/stem.h"
#endif

namespace resnet_fused::cuda {
namespace {

constexpr const char* kOp = "conv_bn_act_pool_cuda";

// Hopper's own kernel where it serves.
std::string launch(const ConvSizes& sizes, sm80::Type type, const sm80::StemOperands& o,
                   const DeviceFacts& facts, CUstream_st* stream) {
  const auto p = problem_of<sm80::Problem>(sizes);
  const std::string refused = sm80::stem_refuses(p);
  if (!refused.empty()) return refused;
#ifndef RESNET_FUSED_WITHOUT_SM90
  if (facts.major == 9 && facts.minor == 0) {
    const auto hopper = problem_of<sm90::Problem>(sizes);
    if (sm90::stem_refuses(hopper).empty())
      return sm90::launch_stem(
          hopper, {type == sm80::Type::kBFloat16, o.relu, o.x, o.weight, o.scale, o.shift, o.y},
          {facts.multiprocessors}, stream);
  }
#endif
  return sm80::launch_stem(p, type, o, {facts.multiprocessors, facts.shared_bytes}, stream);
}

Tensor conv_bn_act_pool(const Tensor& x, const Tensor& packed, const Tensor& scale,
                        const Tensor& shift, const IntPair& kernel_size, const IntPair& stride,
                        const IntPair& padding, StringHandle act_handle) {
  const std::string act = take_string(act_handle);
  const MaybeTensor none;
  const IntPair one{1, 1};
  Sizes sizes = check_arguments({kOp, x, packed, scale, shift, none, none, none, none, none,
                                 kernel_size, stride, padding, one, 1, act, one});
  const ScalarType type = x.scalar_type();
  check(type != ScalarType::Float, kOp, ": x must be bfloat16 or float16, got float32");
  for (int i = 2; i < 4; ++i) sizes[i] = (sizes[i] - 1) / 2 + 1;
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor y = empty_nhwc(x, sizes);
  if (y.numel() > 0) {
    const Tensor image = dense_image(x), weight = dense_image(packed);
    const Tensor factors = dense_vector(scale), terms = dense_vector(shift);
    const std::string failed =
        launch({sizes_of(image), scale.numel(), kernel_size, stride, padding, one},
               type == ScalarType::BFloat16 ? sm80::Type::kBFloat16 : sm80::Type::kFloat16,
               {act == "relu", image.const_data_ptr(), weight.const_data_ptr(),
                static_cast<const float*>(factors.const_data_ptr()),
                static_cast<const float*>(terms.const_data_ptr()), y.mutable_data_ptr()},
               device_facts(device), current_stream(device));
    check(failed.empty(), kOp, ": ", failed);
  }
  return x.dim() == 4 ? y : torch::stable::squeeze(y, 0);
}

// Empty where the kernel serves an x of this size, (N, C, H, W), else one sentence.
std::string refusal(const Sizes& x, int64_t channels, const IntPair& kernel_size,
                    const IntPair& stride, const IntPair& padding) {
  check(x.size() == 4, "conv_bn_act_pool_refusal: x must be 4 sizes, got ", shape_text(x));
  return sm80::stem_refuses(
      problem_of<sm80::Problem>({x, channels, kernel_size, stride, padding, {1, 1}}));
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("conv_bn_act_pool_cuda", TORCH_BOX(&resnet_fused::cuda::conv_bn_act_pool));
}

// An op without a tensor argument has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("conv_bn_act_pool_refusal", TORCH_BOX(&resnet_fused::cuda::refusal));
}
