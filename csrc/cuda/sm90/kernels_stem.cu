#include "cuda/sm90/stem_kernel.cuh"

namespace resnet_fused::sm90 {
namespace {

template <typename T>
const void* kernel_of(int tile) {
  static_assert(kStemTileCount == 2);
  return tile == 0 ? reinterpret_cast<const void*>(&stem_kernel<T, 0>)
                   : reinterpret_cast<const void*>(&stem_kernel<T, 1>);
}

}  // namespace

const void* stem_bfloat16(int tile) { return kernel_of<__nv_bfloat16>(tile); }
const void* stem_float16(int tile) { return kernel_of<__half>(tile); }

}  // namespace resnet_fused::sm90
