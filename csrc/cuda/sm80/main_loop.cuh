// The loop over a reduction that the convolution and the block's tail share: stages of both
// operands come through a ring of cp.async copies, `kStages - 1` ahead of the products; a barrier a
// stage keeps the ring.
#pragma once

#include "cuda/sm80/multiplier.cuh"

namespace resnet_fused::sm80 {

// Adds the products of steps `begin` to `end` to `sum`. load(step, stage) starts exactly one group
// of copies, an empty one where nothing is left, so that the wait counts alike. before(step) runs
// ahead of a step's products. first: the stage of the first step. When it returns, groups may be in
// flight, and other warps may still read the ring.
template <typename T, typename C, typename Load, typename Before>
RF_DEVICE void multiply_steps(Multiplier<T, C>& multiplier, float (&sum)[C::kMs][C::kNs][4],
                              int begin, int end, int first, const Load& load,
                              const Before& before) {
#pragma unroll
  for (int i = 0; i < C::kStages - 1; ++i) load(begin + i, (first + i) % C::kStages);
  int stage = first, free_stage = (first + C::kStages - 1) % C::kStages;
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    copies_wait<C::kStages - 2>();
    __syncthreads();  // this step has landed for all, and all are done with the stage refilled next
    before(step);
    if constexpr (C::kMath == Math::kFloat32) {
      load(step + C::kStages - 1, free_stage);
      multiplier.multiply_stage(sum, stage);
    } else {
      multiplier.fetch(stage, 0, 0);
      load(step + C::kStages - 1, free_stage);
#pragma unroll
      for (int i = 0; i < C::kChunks / 2; ++i) {
        if (i + 1 < C::kChunks / 2) multiplier.fetch(stage, i + 1, (i + 1) & 1);
        multiplier.products(sum, i & 1);
      }
    }
    stage = stage + 1 == C::kStages ? 0 : stage + 1;
    free_stage = free_stage + 1 == C::kStages ? 0 : free_stage + 1;
  }
}

}  // namespace resnet_fused::sm80
