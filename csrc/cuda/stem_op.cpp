// conv_bn_act_pool_cuda: y = maxpool3x3/2(act(conv(x) * scale + shift)) in one kernel, and which
// convolutions it serves.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/conv_launch.h"
#include "cuda/sm80/stem.h"
#include "op/op_string.h"
#ifndef RESNET_FUSED_WITHOUT_SM90
#include "cuda/sm90/stem.h"
#endif

namespace resnet_fused::cuda {
namespace {

constexpr const char* kOp = "conv_bn_act_pool_cuda";

Tensor conv_bn_act_pool(const Tensor& x, const Tensor& packed, const Tensor& scale,
                        const Tensor& shift, const IntPair& kernel_size, const IntPair& stride,
                        const IntPair& padding, StringHandle act_handle) {
  const std::string act = take_string(act_handle);
  const MaybeTensor none;
  const IntPair one{1, 1};
  const ConvArguments a{kOp,  x,           packed, scale,   shift, none, none, none, none,
                        none, kernel_size, stride, padding, one,   1,    act,  one};
  const Sizes out = check_arguments(a);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor y = launch_with_pool(pooled_conv_of(a, out), x);
  return x.dim() == 4 ? y : torch::stable::squeeze(y, 0);
}

// Empty where the kernel serves an x of this size, (N, C, H, W), else one sentence.
std::string refusal(const Sizes& x, int64_t channels, const IntPair& kernel_size,
                    const IntPair& stride, const IntPair& padding) {
  check(x.size() == 4, "conv_bn_act_pool_refusal: x must be 4 sizes, got ", shape_text(x));
  return sm80::stem_refuses(problem_of({x, channels, kernel_size, stride, padding, {1, 1}}));
}

// Hopper's own kernel where it serves.
std::string run(const Conv& conv, const sm80::StemOperands& o, const DeviceFacts& facts,
                CUstream_st* stream) {
  const Problem p = problem_of(conv.wanted.sizes);
  const std::string refused = sm80::stem_refuses(p);
  if (!refused.empty()) return refused;
#ifndef RESNET_FUSED_WITHOUT_SM90
  if (facts.major == 9 && facts.minor == 0) {
    if (sm90::stem_refuses(p).empty())
      return sm90::launch_stem(
          p,
          {conv.wanted.type == sm80::Type::kBFloat16, o.relu, o.x, o.weight, o.scale, o.shift, o.y},
          sm90_device(facts), stream);
  }
#endif
  return sm80::launch_stem(p, conv.wanted.type, o, sm80_device(facts), stream);
}

}  // namespace

Conv pooled_conv_of(const ConvArguments& a, const Sizes& out) {
  check(a.x.scalar_type() != ScalarType::Float, a.op,
        ": x must be bfloat16 or float16, got float32");
  return conv_of(a, {out[0], out[1], pooled(out[2]), pooled(out[3])}, "");
}

Tensor launch_with_pool(const Conv& conv, const Tensor& x) {
  const Tensor y = empty_nhwc(x, conv.out);
  if (y.numel() == 0) return y;
  const int device = x.get_device_index();
  const Tensor image = dense_image(x);
  const std::string failed = run(conv,
                                 {conv.relu, image.const_data_ptr(), conv.packed.const_data_ptr(),
                                  floats(conv.scale), floats(conv.shift), y.mutable_data_ptr()},
                                 device_facts(device), current_stream(device));
  check(failed.empty(), conv.op, ": ", failed);
  return y;
}

}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("conv_bn_act_pool_cuda", TORCH_BOX(&resnet_fused::cuda::conv_bn_act_pool));
}

// An op without a tensor argument has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("conv_bn_act_pool_refusal", TORCH_BOX(&resnet_fused::cuda::refusal));
}
