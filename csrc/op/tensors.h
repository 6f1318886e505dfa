// Of tensors on any device: names and checks of dtypes and shapes, and the NHWC layout.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "check.h"

namespace resnet_fused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Bool:
      return "bool";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      return torch::headeronly::toString(type);
  }
}

// "cuda:1" or "cpu", as Python prints a device. Written only where a check fails.
struct DeviceText {
  const Tensor& tensor;
};

inline DeviceText device_text(const Tensor& tensor) { return {tensor}; }

inline std::ostream& operator<<(std::ostream& text, const DeviceText& device) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(device.tensor.get(), &type));
  const int32_t index = device.tensor.get_device_index();
  if (type == aoti_torch_device_type_cuda()) return text << "cuda:" << index;
  if (type == aoti_torch_device_type_cpu()) return text << "cpu";
  if (type == aoti_torch_device_type_meta()) return text << "meta";
  if (type == aoti_torch_device_type_xpu()) return text << "xpu:" << index;
  return text << "a device of torch's type " << type;
}

inline void check_dtype(const Tensor& tensor, ScalarType expected, const OpName& op,
                        const char* name) {
  check(tensor.scalar_type() == expected, op, ": ", name, " must be ", dtype_name(expected),
        ", got ", dtype_name(tensor.scalar_type()));
}

template <typename Range>
void check_shape(const Tensor& tensor, const Range& expected, const OpName& op, const char* name) {
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == expected.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == expected[i];
  check(same, op, ": ", name, " must have shape ", shape_text(expected), ", got ",
        shape_text(sizes));
}

// Whether a 4-D tensor lies in memory as dense NHWC; strides of dimensions of size 1 do not matter.
inline bool is_nhwc(const Tensor& tensor) {
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    const int64_t size = tensor.size(dim);
    if (size != 1 && tensor.stride(dim) != expected) return false;
    expected *= size;
  }
  return true;
}

// But for dimensions of size 1.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// `tensor` with the strides of `like`, which is dense.
inline Tensor with_layout(const Tensor& tensor, const Tensor& like) {
  if (same_strides(tensor, like)) return tensor;
  Tensor copy = torch::stable::empty_like(like);
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace resnet_fused
