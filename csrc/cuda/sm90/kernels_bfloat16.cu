#include "cuda/sm90/kernels.cuh"

namespace resnet_fused::sm90 {

const void* kernel_bfloat16(int tile, bool shortcut, bool split) {
  return kernel_of<__nv_bfloat16>(tile, shortcut, split);
}
const void* tap_shift_bfloat16(int n, bool shared, bool shortcut) {
  return tap_shift_kernel_of<__nv_bfloat16>(n, shared, shortcut);
}

}  // namespace resnet_fused::sm90
