#include "cuda/sm80/head.cuh"

namespace resnet_fused::sm80 {

const void* head_bfloat16() { return reinterpret_cast<const void*>(&head_kernel<__nv_bfloat16>); }
const void* head_float16() { return reinterpret_cast<const void*>(&head_kernel<__half>); }
const void* head_float32() { return reinterpret_cast<const void*>(&head_kernel<float>); }

}  // namespace resnet_fused::sm80
