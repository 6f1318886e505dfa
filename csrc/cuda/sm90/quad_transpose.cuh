// From what wgmma leaves in four lanes to 16 bytes for each of them.
#pragma once

#include "cuda/sm90/ptx.cuh"

namespace resnet_fused::sm90 {

// Lane q, word i receives lane i's word q, within each quad of lanes. Its own inverse.
RF_DEVICE void quad_transpose(uint32_t (&w)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    if (odd) {
      w[i] = got;
    } else {
      w[i + 1] = got;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
    if (upper) {
      w[i] = got;
    } else {
      w[i + 2] = got;
    }
  }
}

}  // namespace resnet_fused::sm90
