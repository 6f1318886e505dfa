#include "cuda/sm80/kernels.cuh"
#include "cuda/sm80/kernels.h"

namespace resnet_fused::sm80 {

const void* kernel_tf32(int tile, bool shortcut) {
  return reinterpret_cast<const void*>(kernel_of<float, Math::kTf32>(tile, shortcut));
}

}  // namespace resnet_fused::sm80
