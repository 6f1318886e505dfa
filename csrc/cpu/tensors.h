// Between CPU tensors and the raw pointers that kernels take: dtypes and the NHWC layout.
#pragma once

#include "conv.h"
#include "op/tensors.h"

namespace resnet_fused {

// The kernels' dtype of a tensor; `op` and `name` go into the sentence that refuses others.
inline DType kernel_dtype(const Tensor& tensor, const OpName& op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      fail(op, ": ", name, " must be float32, bfloat16, float16 or float64, got ",
           dtype_name(tensor.scalar_type()));
  }
}

inline void check_cpu(const Tensor& tensor, const OpName& op, const char* name,
                      const char* x_name = "x") {
  check(tensor.is_cpu(), op, ": ", name, " must be on cpu, where ", x_name, " is, got ",
        device_text(tensor));
}

// The tensor itself where it is contiguous, else a contiguous copy.
inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Whether the strides are exactly those of empty_nhwc.
inline bool has_nhwc_strides(const Tensor& tensor) {
  const int64_t c = tensor.size(1), h = tensor.size(2), w = tensor.size(3);
  return tensor.stride(1) == 1 && tensor.stride(3) == c && tensor.stride(2) == w * c &&
         tensor.stride(0) == h * w * c;
}

// A 4-D CPU tensor (N, C, H, W) of canonical channels_last strides, also where a dimension is 1 or
// 0; the Python fakes build theirs the same way.
Tensor empty_nhwc(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w);

// The tensor itself where it already is dense NHWC, else a dense NHWC copy.
inline Tensor to_nhwc(const Tensor& tensor) {
  if (tensor.numel() == 0 || is_nhwc(tensor)) return tensor;
  Tensor copy = empty_nhwc(tensor, tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3));
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace resnet_fused
