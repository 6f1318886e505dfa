#include "cuda/sm80/scale_shift.cuh"

namespace resnet_fused::sm80 {

const void* scale_shift_bfloat16() {
  return reinterpret_cast<const void*>(&scale_shift_kernel<__nv_bfloat16>);
}
const void* scale_shift_float16() {
  return reinterpret_cast<const void*>(&scale_shift_kernel<__half>);
}
const void* scale_shift_float32() {
  return reinterpret_cast<const void*>(&scale_shift_kernel<float>);
}

}  // namespace resnet_fused::sm80
