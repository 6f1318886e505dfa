// Split-K: the sums of a tile's splits, added in the order of the splits.
//
// The loads of a round do not wait for one another. One at a time, as this was, the machine code
// had one LDG before its four FADD and the branch: 64 loads in a row for sm_80's 64x32 in 8 splits,
// each as long as L2 takes to answer. Now it has 4 rounds of 16 LDG before 64 FADD, and the same
// bits.
//
// Included behind an architecture's ptx.cuh, which defines RF_DEVICE.
#pragma once

#include "cuda/split_sum.h"

namespace resnet_fused::cuda {

// load(split, quad) gives four of a thread's sums, keep(quad, total) takes them added up.
template <int kQuads, typename Load, typename Keep>
RF_DEVICE void add_in_order(int splits, const Load& load, const Keep& keep) {
  constexpr int kAtOnce = quads_at_once(kQuads), kSplits = splits_at_once(kQuads);
  static_assert(kQuads % kAtOnce == 0, "whole rounds");
  // Added to anything, even to -0, this changes nothing.
  const float4 nothing = make_float4(-0.f, -0.f, -0.f, -0.f);
#pragma unroll
  for (int quad = 0; quad < kQuads; quad += kAtOnce) {
    float4 total[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) total[i] = nothing;
#pragma unroll 1
    for (int split = 0; split < splits; split += kSplits) {
      float4 part[kSplits][kAtOnce];
#pragma unroll
      for (int s = 0; s < kSplits; ++s)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
          part[s][i] = split + s < splits ? load(split + s, quad + i) : nothing;
#pragma unroll
      for (int s = 0; s < kSplits; ++s)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          total[i].x += part[s][i].x;
          total[i].y += part[s][i].y;
          total[i].z += part[s][i].z;
          total[i].w += part[s][i].w;
        }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) keep(quad + i, total[i]);
  }
}

}  // namespace resnet_fused::cuda
