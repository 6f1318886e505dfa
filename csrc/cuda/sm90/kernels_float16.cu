#include "cuda/sm90/kernels.cuh"

namespace resnet_fused::sm90 {

const void* kernel_float16(int tile, bool shortcut, bool split) {
  return kernel_of<__half>(tile, shortcut, split);
}

}  // namespace resnet_fused::sm90
