// Split-K: the splits of a tile leave their sums in a workspace, and whoever comes last adds them,
// always in the order of the splits, so that the result does not depend on timing.
#pragma once

#include "cuda/sm80/config.cuh"
#include "cuda/split_sum.cuh"

namespace resnet_fused::sm80 {

// `sum` becomes the total where this returns true (the caller's block is the last). `word`: shared
// memory that nothing else uses.
template <typename C>
RF_DEVICE bool add_splits(float (&sum)[C::kMs][C::kNs][4], const KernelParams& p, int tile,
                          int split, int tid, unsigned* word) {
  constexpr int kQuads = C::kMs * C::kNs;
  const int64_t tiles = tiles_of(p.schedule);
  const auto sums_of = [&](int s) {
    return reinterpret_cast<float4*>(p.partial) + (s * tiles + tile) * (kQuads * C::kThreads) + tid;
  };
#pragma unroll
  for (int i = 0; i < C::kMs; ++i)
#pragma unroll
    for (int j = 0; j < C::kNs; ++j)
      __stcg(sums_of(split) + (i * C::kNs + j) * C::kThreads,
             make_float4(sum[i][j][0], sum[i][j][1], sum[i][j][2], sum[i][j][3]));
  __syncthreads();
  if (tid == 0) {
    __threadfence();  // what the barrier collected, before the ticket
    *word = atomicAdd(p.tickets + tile, 1u);
    __threadfence();  // the other splits' sums, after the ticket
  }
  __syncthreads();
  if (*word != unsigned(p.schedule.splits - 1)) return false;
  if (tid == 0) p.tickets[tile] = 0;
  const auto keep = [&](int i, const float4& total) {
    float* const s = sum[i / C::kNs][i % C::kNs];
    s[0] = total.x;
    s[1] = total.y;
    s[2] = total.z;
    s[3] = total.w;
  };
  const auto load = [&](int s, int quad) { return __ldcg(sums_of(s) + quad * C::kThreads); };
  cuda::add_in_order<kQuads>(p.schedule.splits, load, keep);
  return true;
}

}  // namespace resnet_fused::sm80
