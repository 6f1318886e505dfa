#include "cuda/sm80/add_relu.cuh"
#include "cuda/sm80/kernels.h"

namespace resnet_fused::sm80 {

const void* add_relu_bfloat16() {
  return reinterpret_cast<const void*>(&add_relu_kernel<__nv_bfloat16>);
}
const void* add_relu_float16() { return reinterpret_cast<const void*>(&add_relu_kernel<__half>); }
const void* add_relu_float32() { return reinterpret_cast<const void*>(&add_relu_kernel<float>); }

}  // namespace resnet_fused::sm80
