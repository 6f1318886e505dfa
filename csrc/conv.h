// The description of one fused convolution: plain structs, the only thing a kernel ever sees.
#pragma once

#include <cstdint>

namespace resnet_fused {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Which kernel computes a convolution, and with it the layout of its packed weights (cpu/plan.h).
// S2: for stride 2. Bf16: products of bfloat16 pairs, summed in float32.
enum class Plan {
  kDirect,
  kWinograd4,
  kWinograd4Raw,
  kWinograd2,
  kWinograd5,
  kWinograd4S2,
  kWinograd2S2,
  kDirectBf16,
  kWinograd2Bf16,
  kWinograd2S2Bf16,
  kStem,
  kTorch,
};

// A 2-D convolution, NHWC. Sizes in elements; the input has in_channels = groups *
// channels_per_group.
struct ConvShape {
  int64_t batch, in_h, in_w, in_channels;
  int64_t out_channels, groups;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;
  int64_t dilation_h, dilation_w;

  int64_t out_h() const {
    return (in_h + 2 * pad_h - dilation_h * (kernel_h - 1) - 1) / stride_h + 1;
  }
  int64_t out_w() const {
    return (in_w + 2 * pad_w - dilation_w * (kernel_w - 1) - 1) / stride_w + 1;
  }
  int64_t out_pixels() const { return batch * out_h() * out_w(); }
  int64_t group_in() const { return in_channels / groups; }
  int64_t group_out() const { return out_channels / groups; }
  // Length of the reduction of one output element: kernel_h * kernel_w * channels per group.
  int64_t reduction() const { return kernel_h * kernel_w * group_in(); }
};

// act(conv(x, weight) * scale + shift + residual). x, residual and y have `dtype` and are dense
// NHWC; packed holds the weights in the layout of the plan, in 32-bit words; residual may be null.
struct ConvArgs {
  ConvShape shape;
  DType dtype;
  Plan plan;
  bool relu;
  const void* x;
  const float* packed;
  const float* scale;
  const float* shift;
  const void* residual;
  void* y;
};

}  // namespace resnet_fused
