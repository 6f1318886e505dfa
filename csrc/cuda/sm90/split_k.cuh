// Split-K: the splits of a tile are the blocks of a cluster. Each leaves its sums in its own shared
// memory, where the operands were, and the blocks add them over distributed shared memory, each the
// rows of some of the warps, always in the order of the splits.
//
// Before, the sums went through a workspace in global memory, and whoever drew the last ticket
// added them. On an H100 that took 3.5 to 4.5 us more than no split, batch 1 of 128 channels of
// 28 x 28 for one (8.1 us in 2 splits, 4.6 in one): sums, fence, ticket and loads each go to L2 and
// back, and in a captured graph the tickets' memset took the overlap of launches away. A cluster of
// two takes 0.7 us more (5.5 us), and where the reduction is long it pays: 512 channels of 7 x 7
// went from 9.0 to 6.5 us.
#pragma once

#include "cuda/sm90/config.cuh"
// After it.
#include "cuda/split_sum.cuh"

namespace resnet_fused::sm90 {

// `sum`: a thread's accumulators, replaced by the total where this returns true: its warp is to
// store them. `ring`, `shared`: the stages, all of whose copies have landed and been used.
// `barrier`: the warpgroup's. A block must not end before cluster_wait(): others may still read
// what is here.
template <typename C>
RF_DEVICE bool add_splits(float (&sum)[C::kMBlocks][C::kN / 2], int splits, int split,
                          uint32_t ring, uint8_t* shared, int tid, int barrier) {
  constexpr int kRow = C::kN / 8, kQuads = C::kMBlocks * kRow;
  static_assert(kQuads * 128 * 16 <= C::kStages * C::kStageBytes, "the sums fit in the stages");
  float4* const mine = reinterpret_cast<float4*>(shared) + tid;
  group_barrier<128>(barrier);  // each warp has waited for its own part of the products alone
#pragma unroll
  for (int i = 0; i < kQuads; ++i) {
    const float* const s = &sum[i / kRow][4 * (i % kRow)];
    mine[i * 128] = make_float4(s[0], s[1], s[2], s[3]);
  }
  cluster_arrive();
  cluster_wait();
  const bool adds = (tid >> 5) % min(splits, 4) == split;  // of eight blocks four
  if (adds) {
    const auto load = [&](int i, int quad) {
      return load_from_block(i, ring + 16 * (quad * 128 + tid));
    };
    const auto keep = [&](int i, const float4& total) {
      float* const s = &sum[i / kRow][4 * (i % kRow)];
      s[0] = total.x;
      s[1] = total.y;
      s[2] = total.z;
      s[3] = total.w;
    };
    cuda::add_in_order<kQuads>(splits, load, keep);
  }
  cluster_arrive();
  return adds;
}

}  // namespace resnet_fused::sm90
