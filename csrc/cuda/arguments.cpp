#include "cuda/arguments.h"

namespace resnet_fused::cuda {

void check_device(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_cuda(), op, ": ", name, " must be on a CUDA device, got ", device_text(tensor));
}

void check_like(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                ScalarType type, const char* x_name) {
  check_dtype(tensor, type, op, name);
  check(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), op, ": ", name,
        " must be on ", device_text(x), ", where ", x_name, " is, got ", device_text(tensor));
}

sm80::Type check_elements(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return sm80::Type::kBFloat16;
    case ScalarType::Half:
      return sm80::Type::kFloat16;
    case ScalarType::Float:
      return sm80::Type::kFloat32;
    default:
      fail(op, ": ", name, " must be float32, bfloat16 or float16, got ",
           dtype_name(tensor.scalar_type()));
  }
}

}  // namespace resnet_fused::cuda
