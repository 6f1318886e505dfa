// Host only, without the CUDA runtime.
#include "cuda/sm80/pointwise.h"

#include <algorithm>

#include "cuda/sm80/scale_shift.h"

namespace resnet_fused::sm80 {

bool in_vectors(const ScaleShift& p, Type type) {
  const auto bits = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.residual) |
                    reinterpret_cast<uintptr_t>(p.y) | reinterpret_cast<uintptr_t>(p.scale) |
                    reinterpret_cast<uintptr_t>(p.shift);
  return bits % 16 == 0 && p.channels % (16 / element_bytes(type)) == 0;
}

int pointwise_blocks(int64_t count, int elements_each, const Device& device) {
  constexpr int kBlocksPerSm = 8;  // 2048 threads fill a multiprocessor
  const int64_t each = int64_t(kPointwiseThreads) * elements_each;
  return int(std::min((count + each - 1) / each, int64_t(device.multiprocessors) * kBlocksPerSm));
}

}  // namespace resnet_fused::sm80
