// Convolution + batch norm + residual or shortcut + ReLU for sm_90a: implicit GEMM, persistent and
// warp-specialised.
//
// One thread of the first warpgroup asks TMA for the operands of each step of the reduction: the
// im2col mode collects a tile's input pixels under one filter tap, with zeros for the padding, so
// that no index arithmetic is left to the other threads. One or two warpgroups multiply with wgmma
// straight from shared memory. Stages are handed over by mbarriers: `full` completes when the bytes
// have landed, `empty` when every warp that read them has seen its wgmma end.
//
// Blocks are as many as the device holds at once, and each takes every gridDim.x-th tile. Two
// warpgroups either take turns (ping-pong: the epilogue of one tile runs under the sums of the
// next) or share a tile. With one consumer, two blocks share an SM instead, which suits problems of
// few tiles; and only these split the reduction, with a block for each split.
//
// Registers: 384 threads get 168 each at launch; the producer returns most of its own, so that a
// consumer may hold 128 accumulators. See shortcut.cuh, split_k.cuh, staged_store.cuh and
// epilogue.cuh for what happens to those.
#pragma once

#include "cuda/sm90/epilogue.cuh"
#include "cuda/sm90/operand.h"
#include "cuda/sm90/ring.h"
#include "cuda/sm90/split_k.cuh"
#include "cuda/sm90/staged_store.cuh"
#include "cuda/sm90/wgmma.cuh"

namespace resnet_fused::sm90 {

// Shared-window addresses of a block's stages and barriers.
template <typename C>
struct Stages {
  uint32_t base;
  RF_DEVICE uint32_t at(uint32_t stage) const { return base + stage * C::kStageBytes; }
  RF_DEVICE uint32_t full(uint32_t stage) const { return base + C::kBarriers + 16 * stage; }
  RF_DEVICE uint32_t empty(uint32_t stage) const { return full(stage) + 8; }
  RF_DEVICE uint32_t turn(uint32_t warpgroup) const {
    return base + C::kBarriers + 16 * C::kStages + 8 * warpgroup;
  }
  RF_DEVICE uint32_t landed(uint32_t warpgroup) const { return turn(2 + warpgroup); }
  RF_DEVICE uint32_t place(uint32_t warpgroup) const {
    return base + C::kPlaces + warpgroup * C::kPlaceBytes;
  }
};

// Named barriers (0 is __syncthreads): of each consumer warpgroup, and of a team that shares a
// tile.
enum NamedBarrier { kWarpgroup0 = 1, kTeam0 = 3 };

template <typename C, bool kShortcut>
RF_DEVICE void prepare_barriers(const KernelParams& p, const Stages<C>& stages) {
  prefetch_map(&p.x);
  prefetch_map(&p.weight);
  if constexpr (C::kStaged) {
    prefetch_map(&p.y_map);
    if (p.residual) prefetch_map(&p.residual_map);
  }
  if constexpr (kShortcut) {
    prefetch_map(&p.shortcut_x);
    prefetch_map(&p.shortcut_weight);
  }
#pragma unroll 1
  for (int s = 0; s < C::kStages; ++s) {
    barrier_init(stages.full(s), 1);
    barrier_init(stages.empty(s), C::kEmptyArrivals);
  }
  barrier_init(stages.turn(0), 4);
  barrier_init(stages.turn(1), 4);
  barrier_init(stages.landed(0), 1);
  barrier_init(stages.landed(1), 1);
  barrier_init_fence();
}

// One thread.
template <typename C, bool kShortcut>
RF_DEVICE void produce(const KernelParams& p, const Stages<C>& stages) {
  const uint64_t keep = keep_in_l2();
  const int items = work_items(p.schedule);
  const auto load_weights = [&](uint32_t stage, const Step& step, int channel) {
    const uint32_t to = stages.at(stage) + C::kWeightRows, full = stages.full(stage);
    if (kShortcut && step.shortcut) {
      tma_tile(to, &p.shortcut_weight, full, step.c, 0, channel, keep);
    } else {
      tma_tile(to, &p.weight, full, step.c, step.r * p.reduction.kernel_w + step.s, channel, keep);
    }
  };

  // The first stages' weights, where the kernel before this one is known not to write them.
  int early = 0;
  if (p.early_weights && int(blockIdx.x) < items) {
    const Work work = work_at(p.schedule, C::kTilePixels, C::kTileChannels, blockIdx.x);
    Step step = step_at(p.reduction, work.begin);
#pragma unroll 1
    for (; early < C::kStages && work.begin + early < work.end; ++early) {
      barrier_expect(stages.full(early), C::kStageBytes);
      load_weights(early, step, work.channel);
      step_next(p.reduction, work.begin + early, step);
    }
  }
  wait_for_earlier_kernels();
  // Only now: the next kernel may then rely on all before this one having ended.
  let_next_kernel_start();

  Ring ring{0, 0};
#pragma unroll 1
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const Work work = work_at(p.schedule, C::kTilePixels, C::kTileChannels, item);
    const Coordinate at =
        first_tap(p.schedule, work.pixel, p.stride_h, p.stride_w, p.pad_h, p.pad_w);
    Coordinate shortcut_at = {};
    if constexpr (kShortcut)
      shortcut_at =
          first_tap(p.schedule, work.pixel, p.shortcut_stride_h, p.shortcut_stride_w, 0, 0);
    Step step = step_at(p.reduction, work.begin);
#pragma unroll 1
    for (int i = work.begin; i < work.end; ++i) {
      const uint32_t full = stages.full(ring.stage);
      if (early > 0) {
        --early;
      } else {
        barrier_wait(stages.empty(ring.stage), empty_parity(ring));
        barrier_expect(full, C::kStageBytes);
        load_weights(ring.stage, step, work.channel);
      }
      const uint32_t to = stages.at(ring.stage) + C::kPixelRows;
      if (kShortcut && step.shortcut) {
        tma_im2col(to, &p.shortcut_x, full, step.c, shortcut_at.w, shortcut_at.h, shortcut_at.n, 0,
                   0);
      } else {
        tma_im2col(to, &p.x, full, step.c, at.w, at.h, at.n, uint16_t(step.s * p.dilation_w),
                   uint16_t(step.r * p.dilation_h));
      }
      step_next(p.reduction, i, step);
      ring_next(ring, C::kStages);
    }
  }
}

// One warpgroup, number `warpgroup` of the consumers. `shared` is the generic address of the
// stages.
template <typename T, typename C, bool kShortcut, bool kSplitK>
RF_DEVICE void consume(const KernelParams& p, const Stages<C>& stages, uint8_t* shared,
                       int warpgroup) {
  const int tid = int(threadIdx.x) & 127, lane = tid & 31;
  const int team_thread = C::kShared ? 128 * warpgroup + tid : tid;
  const int team_barrier = kTeam0 + (C::kShared ? 0 : warpgroup);
  const int row = C::kShared ? 64 * C::kMBlocks * warpgroup : 0;  // this warpgroup's part of M
  const int items = work_items(p.schedule);
  float sum[C::kMBlocks][C::kN / 2];
  uint32_t iteration = 0;  // of this block, in the producer's order: the ring's clock

  wait_for_earlier_kernels();  // the residual and y may be in use before
  Place<place_pixels(C::kT), C::kChannelsOnM ? C::kMBlocks : C::kN / 64> place{
      stages.place(warpgroup), stages.landed(warpgroup), 0};
#pragma unroll 1
  for (int i = 0, item = blockIdx.x; item < items; item += gridDim.x, ++i) {
    const Work work = work_at(p.schedule, C::kTilePixels, C::kTileChannels, item);
    Ring ring = ring_at(iteration, C::kStages);
    iteration += work.end - work.begin;
    if (C::kPingPong && (i & 1) != warpgroup) continue;
    const int tile_row = C::kChannelsOnM ? work.channel + row : work.pixel + row;
    const int channel = C::kChannelsOnM ? tile_row : work.channel;
    const int pixel = C::kChannelsOnM ? work.pixel : tile_row;
    if constexpr (C::kStaged)
      if (tid == 0) place.begin(p, channel, pixel, 0, 0);
    if (C::kPingPong && i > 0) barrier_wait(stages.turn(warpgroup), turn_parity(i));

    // Steps `begin` to `end` of the reduction; all that they read is released at the end.
    const auto multiply = [&](int begin, int end, auto before_products) {
      uint32_t last = 0;
#pragma unroll
      for (int m = 0; m < C::kMBlocks; ++m) hold_registers(sum[m]);
#pragma unroll 1
      for (int k = begin; k < end; ++k) {
        barrier_wait(stages.full(ring.stage), full_parity(ring));
        if (C::kPingPong && k == work.end - 1 && lane == 0)
          barrier_arrive(stages.turn(warpgroup ^ 1));
        before_products(ring.stage);
        const uint32_t at = stages.at(ring.stage);
        const uint64_t a = operand_descriptor(at + row * C::kSpan, C::kSpan);
        const uint64_t b = operand_descriptor(at + C::kBytesA, C::kSpan);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < C::kChunk / 16; ++c) {
#pragma unroll
          for (int m = 0; m < C::kMBlocks; ++m)
            Wgmma<T, C::kN>::issue(sum[m], a + 2 * c + m * (64 * C::kSpan / 16), b + 2 * c,
                                   k > work.begin || c > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the step before has ended: its stage is free
        if (k > begin && lane == 0) barrier_arrive(stages.empty(last));
        last = ring.stage;
        ring_next(ring, C::kStages);
      }
      wgmma_wait<0>();
#pragma unroll
      for (int m = 0; m < C::kMBlocks; ++m) hold_registers(sum[m]);
      if (lane == 0) barrier_arrive(stages.empty(last));
    };
    const auto nothing = [](uint32_t) {};
    if constexpr (kShortcut) {
      const int cut = min(work.end, max(work.begin, p.reduction.main_steps));
      if (work.begin < cut) {
        multiply(work.begin, cut, nothing);
        rescale<C>(sum, p, channel, tid);
      }
      if (cut < work.end) {
        const bool clear = any_dead<C>(p, work.channel, team_thread, team_barrier);
        multiply(cut, work.end, [&](uint32_t stage) {
          if (clear)
            clear_dead_rows<C>(shared + stage * C::kStageBytes + C::kWeightRows, p, work.channel,
                               team_thread, team_barrier);
        });
      }
    } else {
      multiply(work.begin, work.end, nothing);
    }

    if constexpr (kSplitK) {
      if (!add_splits<C>(sum, p.schedule.splits, work.split, stages.base, shared, tid,
                         team_barrier))
        continue;
    }
    if constexpr (C::kStaged) {
      store_by_tma<T, C, kShortcut>(sum, p, place, channel, pixel, 0, 0, tid,
                                    kWarpgroup0 + warpgroup);
    } else {
      store_at_once<T, C, kShortcut>(sum, p, pixel, channel, tid);
    }
  }
  if constexpr (C::kStaged)
    if (tid == 0) wait_for_stores_to_read();
  if constexpr (kSplitK) cluster_wait();
}

template <typename T, int kTile, bool kShortcut, bool kSplitK>
__global__ void __launch_bounds__(Config<kTile>::kThreads, Config<kTile>::kBlocksPerSm)
    conv_kernel(const __grid_constant__ KernelParams p) {
  using C = Config<kTile>;
  RF_DYNAMIC_SHARED(raw);
  const uint32_t start = shared_address(raw);
  const Stages<C> stages{(start + 1023u) & ~1023u};
  const int warpgroup = __shfl_sync(0xffffffffu, int(threadIdx.x) >> 7, 0);
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) >> 5, 0);

  if (warp == 0 && elect_one()) prepare_barriers<C, kShortcut>(p, stages);
  __syncthreads();

  if (warpgroup == 0) {
    if constexpr (C::kConsumers == 2) give_registers<40>();
    if (warp == 0 && elect_one()) produce<C, kShortcut>(p, stages);
  } else {
    if constexpr (C::kConsumers == 2) take_registers<232>();
    consume<T, C, kShortcut, kSplitK>(p, stages, raw + (stages.base - start), warpgroup - 1);
  }
}

}  // namespace resnet_fused::sm90
