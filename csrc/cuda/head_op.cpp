// global_avg_pool and linear on a GPU.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/arguments.h"
#include "cuda/context.h"
#include "cuda/dense.h"
#include "cuda/sm80/head.h"

namespace resnet_fused::cuda {
namespace {

// What of a row must be in multiples of 16 bytes.
void check_rows(int64_t count, sm80::Type type, const char* op, const char* what) {
  const int vector = 16 / sm80::element_bytes(type);
  check(count % vector == 0, op, ": the kernel needs ", what, " in multiples of ", vector, ", got ",
        count);
}

// The kernels count in int, and a grid's second dimension ends at 65535.
constexpr int64_t kMost = 1 << 28, kMostChannels = 1 << 20, kMostImages = 1 << 16;
void check_most(int64_t count, int64_t most, const char* op, const char* what) {
  check(count <= most, op, ": the kernel takes up to ", most, " ", what, ", got ", count);
}

// Dense rows at a multiple of 16 bytes.
Tensor dense_rows(const Tensor& tensor) {
  if (tensor.is_contiguous() && is_aligned(tensor)) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  torch::stable::copy_(copy, tensor);
  return copy;
}

Tensor global_avg_pool(const Tensor& x) {
  const char* op = "global_avg_pool";
  check(x.dim() == 4, op, ": x must be 4-D (N, C, H, W), got shape ", shape_text(x.sizes()));
  const sm80::Type type = check_elements(op, "x", x);
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2) * x.size(3);
  check(pixels > 0, op, ": x must have pixels, got shape ", shape_text(x.sizes()));
  check_rows(channels, type, op, "channels");
  check_most(channels, kMostChannels, op, "channels");
  check_most(pixels, kMost, op, "pixels");
  check_most(images, kMost, op, "images");
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor y = empty_nhwc(x, {images, channels, 1, 1});
  if (y.numel() == 0) return y;
  const Tensor image = dense_image(x);
  const sm80::Pool operands{image.const_data_ptr(), y.mutable_data_ptr(), int(pixels),
                            int(channels)};
  const std::string failed = launch_pool(type, operands, int(images), current_stream(device));
  check(failed.empty(), op, ": ", failed);
  return y;
}

Tensor linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const char* op = "linear";
  check(x.dim() == 2, op, ": x must be 2-D (N, inputs), got shape ", shape_text(x.sizes()));
  const sm80::Type type = check_elements(op, "x", x);
  check_like(op, "weight", weight, x, x.scalar_type());
  check(weight.dim() == 2 && weight.size(1) == x.size(1), op,
        ": weight must be 2-D (outputs, inputs) with the ", x.size(1), " inputs of x, got shape ",
        shape_text(weight.sizes()));
  const int64_t images = x.size(0), inputs = x.size(1), outputs = weight.size(0);
  if (bias) {
    check_like(op, "bias", *bias, x, x.scalar_type());
    check_shape(*bias, Sizes{outputs}, op, "bias");
  }
  check_rows(inputs, type, op, "inputs");
  check_most(inputs, kMost, op, "inputs");
  check_most(outputs, kMost, op, "outputs");
  check_most(images, kMostImages, op, "images");
  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor y = torch::stable::new_empty(x, {images, outputs});
  if (y.numel() == 0) return y;
  const Tensor dense_x = dense_rows(x), rows = dense_rows(weight);
  const MaybeTensor terms = dense_vector(bias);
  const sm80::Linear operands{dense_x.const_data_ptr(),
                              rows.const_data_ptr(),
                              pointer(terms),
                              y.mutable_data_ptr(),
                              int(images),
                              int(inputs),
                              int(outputs)};
  const std::string failed = launch_linear(type, operands, current_stream(device));
  check(failed.empty(), op, ": ", failed);
  return y;
}

}  // namespace
}  // namespace resnet_fused::cuda

STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CUDA, m) {
  m.impl("global_avg_pool", TORCH_BOX(&resnet_fused::cuda::global_avg_pool));
  m.impl("linear", TORCH_BOX(&resnet_fused::cuda::linear));
}
