// global_avg_pool and linear.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "cpu/head.h"
#include "cpu/head_call.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/tensors.h"

namespace resnet_fused {
namespace {

DType head_dtype(const Tensor& x, const char* op) {
  const DType dtype = kernel_dtype(x, op, "x");
  check(dtype != DType::kFloat64, op, ": x must be float32, bfloat16 or float16, got float64");
  return dtype;
}

Tensor global_avg_pool(const Tensor& x) {
  const char* op = "global_avg_pool";
  check(x.dim() == 4, op, ": x must be 4-D (N, C, H, W), got shape ", shape_text(x.sizes()));
  const DType dtype = head_dtype(x, op);
  check(x.size(2) * x.size(3) > 0, op, ": x must have pixels, got shape ", shape_text(x.sizes()));
  return run_global_avg_pool(dtype, x);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "linear";
  check(x.dim() == 2, op, ": x must be 2-D (N, inputs), got shape ", shape_text(x.sizes()));
  const DType dtype = head_dtype(x, op);
  check_dtype(weight, x.scalar_type(), op, "weight");
  check_cpu(weight, op, "weight");
  check(weight.dim() == 2 && weight.size(1) == x.size(1), op,
        ": weight must be 2-D (outputs, inputs) with the ", x.size(1), " inputs of x, got shape ",
        shape_text(weight.sizes()));
  if (bias) {
    check_dtype(*bias, x.scalar_type(), op, "bias");
    check_cpu(*bias, op, "bias");
    check_shape(*bias, std::vector<int64_t>{weight.size(0)}, op, "bias");
  }
  return run_linear(dtype, dense(x), x.size(0), weight, bias);
}

}  // namespace

Tensor run_global_avg_pool(DType dtype, const Tensor& x) {
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  const Tensor image = to_nhwc(x);
  const Tensor y = empty_nhwc(x, images, channels, 1, 1);
  const MeanArgs args{dtype, pixels, channels, image.const_data_ptr(), y.mutable_data_ptr()};
  const Kernels& isa = kernels();
  for_each_span(images * mean_steps(channels), ceil_div(kSpanGrain, pixels * kMeanChannels),
                [&](int64_t begin, int64_t end) { isa.mean(args, begin, end); });
  return y;
}

Tensor run_linear(DType dtype, const Tensor& x, int64_t images, const Tensor& weight,
                  const std::optional<Tensor>& bias) {
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  const Tensor dense_weight = dense(weight);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = dense(*bias);
  const Tensor y = torch::stable::new_empty(x, {images, outputs});
  const LinearArgs args{dtype,
                        images,
                        inputs,
                        outputs,
                        x.const_data_ptr(),
                        dense_weight.const_data_ptr(),
                        dense_bias ? dense_bias->const_data_ptr() : nullptr,
                        y.mutable_data_ptr()};
  const Kernels& isa = kernels();
  for_each_span(outputs, kSpanGrain / std::max<int64_t>(inputs, 1) + 1,
                [&](int64_t begin, int64_t end) { isa.linear(args, begin, end); });
  return y;
}

}  // namespace resnet_fused

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CPU, m) {
  m.impl("global_avg_pool", TORCH_BOX(&resnet_fused::global_avg_pool));
  m.impl("linear", TORCH_BOX(&resnet_fused::linear));
}
