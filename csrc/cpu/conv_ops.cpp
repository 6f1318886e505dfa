// pack_conv and conv_bn_act_packed.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "cpu/conv_call.h"
#include "cpu/pages.h"
#include "op/op_string.h"

namespace resnet_fused {
namespace {

using IntPair = std::vector<int64_t>;

ConvShape weight_shape(const OpName& op, const Tensor& weight, int64_t groups) {
  check(weight.dim() == 4, op,
        ": weight must be 4-D (out_channels, in_channels / groups, kernel_h, kernel_w), got shape ",
        shape_text(weight.sizes()));
  check(weight.numel() > 0, op, ": weight must not be empty, got shape ",
        shape_text(weight.sizes()));
  check(groups >= 1, op, ": groups must be at least 1, got ", groups);
  check(weight.size(0) % groups == 0, op, ": groups must divide the ", weight.size(0),
        " output channels of weight, got ", groups);
  ConvShape shape{};
  shape.out_channels = weight.size(0);
  shape.in_channels = weight.size(1) * groups;
  shape.groups = groups;
  shape.kernel_h = weight.size(2);
  shape.kernel_w = weight.size(3);
  return shape;
}

Tensor pack_conv(const Tensor& weight, int64_t groups, StringHandle plan_name) {
  const OpName op = "pack_conv";
  const std::string name = take_string(plan_name);
  const ConvShape shape = weight_shape(op, weight, groups);
  const DType dtype = kernel_dtype(weight, op, "weight");
  const PlanInfo& plan = parse_plan(op, name);
  if (plan.plan == Plan::kTorch) {
    // PyTorch's own layout; always a copy, so that the packed weight never aliases the parameter.
    Tensor packed =
        empty_nhwc(weight, weight.size(0), weight.size(1), weight.size(2), weight.size(3));
    torch::stable::copy_(packed, weight);
    return packed;
  }
  check_plan_dtype(op, plan, dtype);
  check_plan_weight(op, plan, shape);
  Tensor dense = torch::stable::new_empty(weight, weight.sizes(), ScalarType::Float);
  torch::stable::copy_(dense, weight);
  Tensor packed = torch::stable::new_empty(weight, packed_shape(plan, shape), packed_dtype(plan));
  advise_huge_pages(packed.mutable_data_ptr(),
                    packed.numel() * static_cast<int64_t>(packed.element_size()));
  const float* source = static_cast<const float*>(dense.const_data_ptr());
  if (plan.is_winograd()) {
    winograd_pack(plan.plan, shape, source, packed.mutable_data_ptr());
  } else if (plan.plan == Plan::kStem) {
    stem_pack(shape, source, static_cast<float*>(packed.mutable_data_ptr()));
  } else {
    direct_pack(plan.plan, shape, source, packed.mutable_data_ptr());
  }
  return packed;
}

// Throws unless the residual has the shape of the output, the dtype and the device of x.
void check_residual(const OpName& op, const Tensor& residual, const ConvCall& call,
                    const Image& image) {
  const ConvShape& s = call.shape;
  std::vector<int64_t> expected{s.batch, s.out_channels, s.out_h(), s.out_w()};
  if (!image.batched) expected.erase(expected.begin());
  check_shape(residual, expected, op, "residual");
  check_dtype(residual, image.shape.type, op, "residual");
  check_cpu(residual, op, "residual");
}

const int64_t* pair(const OpName& op, const char* name, const IntPair& values) {
  check(values.size() == 2, op, ": ", name, " must be an int or a pair of ints, got ",
        shape_text(values));
  return values.data();
}

Tensor conv_bn_act_packed(const Tensor& x, const Tensor& packed, const Tensor& scale,
                          const Tensor& shift, const std::optional<Tensor>& residual,
                          const IntPair& kernel_size, const IntPair& stride, const IntPair& padding,
                          const IntPair& dilation, int64_t groups, StringHandle act,
                          StringHandle plan, bool pool) {
  const OpName op = "conv_bn_act_packed";
  ConvSettings settings{};
  settings.act = take_string(act);
  settings.plan = take_string(plan);
  const Image image = check_image(op, x);
  settings.kernel_size = pair(op, "kernel_size", kernel_size);
  settings.stride = pair(op, "stride", stride);
  settings.padding = pair(op, "padding", padding);
  settings.dilation = pair(op, "dilation", dilation);
  settings.groups = groups;
  const ConvCall call = check_conv(op, image.shape, packed, scale, shift, settings);
  std::optional<Tensor> images;
  if (residual) {
    check_residual(op, *residual, call, image);
    images = image.batched ? *residual : torch::stable::unsqueeze(*residual, 0);
  }
  return image.like_input(run_call(call, image.x, images, pool));
}

}  // namespace
}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("pack_conv", TORCH_BOX(&resnet_fused::pack_conv));
  m.impl("conv_bn_act_packed", TORCH_BOX(&resnet_fused::conv_bn_act_packed));
}
