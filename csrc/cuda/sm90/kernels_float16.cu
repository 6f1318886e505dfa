#include "cuda/sm90/kernels.cuh"

namespace resnet_fused::sm90 {

const void* kernel_float16(int tile, bool shortcut, bool split) {
  return kernel_of<__half>(tile, shortcut, split);
}
const void* tap_shift_float16(int n, bool shared, bool shortcut) {
  return tap_shift_kernel_of<__half>(n, shared, shortcut);
}

}  // namespace resnet_fused::sm90
