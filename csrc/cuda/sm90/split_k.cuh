// Split-K: the splits of a tile leave their sums in a workspace, and whoever comes last adds them,
// always in the order of the splits, so that the result does not depend on timing.
#pragma once

#include "cuda/sm90/config.cuh"
#include "cuda/split_sum.cuh"

namespace resnet_fused::sm90 {

// `sum`: a warpgroup's accumulators, replaced by the total where this returns true (the caller is
// the last). `word`: shared memory of this warpgroup; `barrier`: its own.
template <typename C>
RF_DEVICE bool add_splits(float (&sum)[C::kMBlocks][C::kN / 2], const KernelParams& p,
                          const Work& work, int warpgroup, int tid, volatile uint32_t* word,
                          int barrier) {
  constexpr int kParts = C::kShared ? 2 : 1, kRow = C::kN / 8, kQuads = C::kMBlocks * kRow;
  const int slot = work.tile * kParts + (C::kShared ? warpgroup : 0);
  const int64_t slots = int64_t(tiles_of(p.schedule)) * kParts;
  const auto sums_of = [&](int split) {
    return reinterpret_cast<float4*>(p.partial) + (split * slots + slot) * (kQuads * 128) + tid;
  };
  float4* const mine = sums_of(work.split);
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const float* const s = &sum[i / kRow][4 * (i % kRow)];
    __stcg(mine + i * 128, make_float4(s[0], s[1], s[2], s[3]));
  }
  group_barrier<128>(barrier);
  if (tid == 0) {
    __threadfence();  // what the barrier collected, before the ticket
    *word = atomicAdd(p.tickets + slot, 1u);
    __threadfence();  // the other splits' sums, after the ticket
  }
  group_barrier<128>(barrier);
  if (*word != uint32_t(p.schedule.splits - 1)) return false;
  if (tid == 0) p.tickets[slot] = 0;
  const auto keep = [&](int i, const float4& total) {
    float* const s = &sum[i / kRow][4 * (i % kRow)];
    s[0] = total.x;
    s[1] = total.y;
    s[2] = total.z;
    s[3] = total.w;
  };
  cuda::add_in_order<kQuads, 128>(sums_of(0), slots * (kQuads * 128), p.schedule.splits, keep);
  return true;
}

}  // namespace resnet_fused::sm90
