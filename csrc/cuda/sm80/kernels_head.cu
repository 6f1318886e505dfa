#include "cuda/sm80/head.cuh"

namespace resnet_fused::sm80 {
namespace {

template <typename T>
const void* linear_of(bool one_image) {
  return one_image ? reinterpret_cast<const void*>(&linear_kernel<T, 1>)
                   : reinterpret_cast<const void*>(&linear_kernel<T, kLinearImages>);
}

}  // namespace

const void* pool_kernel_of(Type type) {
  return type == Type::kBFloat16  ? reinterpret_cast<const void*>(&pool_kernel<__nv_bfloat16>)
         : type == Type::kFloat16 ? reinterpret_cast<const void*>(&pool_kernel<__half>)
                                  : reinterpret_cast<const void*>(&pool_kernel<float>);
}
const void* linear_kernel_of(Type type, bool one_image) {
  return type == Type::kBFloat16  ? linear_of<__nv_bfloat16>(one_image)
         : type == Type::kFloat16 ? linear_of<__half>(one_image)
                                  : linear_of<float>(one_image);
}

}  // namespace resnet_fused::sm80
