// The convolution as an implicit matrix product, for sm_80 and later.
//
// A block computes one tile of pixels by channels, or one split of its reduction. Stages of both
// operands lie in shared memory (main_loop.cuh) swizzled so that neither copies nor ldmatrix
// collide on a bank. The sums stay in registers until the epilogue. Channel tiles are the fastest
// index of the grid: neighbours in time share activations in L2.
#pragma once

#include "cuda/sm80/epilogue.cuh"
#include "cuda/sm80/loader.cuh"
#include "cuda/sm80/main_loop.cuh"
#include "cuda/sm80/split_k.cuh"

namespace resnet_fused::sm80 {

template <typename T, Math kMath, int kTile, bool kShortcut>
__global__ void __launch_bounds__(threads(kTiles[kTile].tile), kTiles[kTile].blocks_per_sm)
    conv_kernel(const __grid_constant__ KernelParams p) {
  using C = Config<T, kMath, kTile>;
  RF_DYNAMIC_SHARED(shared);
  const int tid = int(threadIdx.x), warp = tid >> 5;
  const int tile = int(blockIdx.x), split = int(blockIdx.y);
  const int pixel_tile = tile / p.schedule.channel_tiles;
  const int channel_tile = tile - pixel_tile * p.schedule.channel_tiles;
  const int pixels = p.problem.n * p.out_h * p.out_w, pixel = pixel_tile * C::kPixels;
  const int per_group = p.problem.k / p.problem.groups;
  const int tiles_per_group = p.schedule.channel_tiles / p.problem.groups;
  const int group = channel_tile / tiles_per_group;
  const int channel = group * per_group + (channel_tile - group * tiles_per_group) * C::kChannels;
  const int channel_end = (group + 1) * per_group;
  const int main_steps = p.schedule.main_steps;
  const int begin = int(int64_t(p.schedule.steps) * split / p.schedule.splits);
  const int end = int(int64_t(p.schedule.steps) * (split + 1) / p.schedule.splits);

  Loader<T, C, kShortcut> loader(p, shared, tid, pixel, pixels, group, channel, channel_end);
  if (kShortcut && begin >= main_steps) {
    loader.open(true, begin - main_steps);
  } else {
    loader.open(false, begin);
  }
  const auto load = [&](int step, int stage) {
    if (step < end) {
      if (kShortcut && step == main_steps && step > begin) loader.open(true, 0);
      loader.load(stage);
    }
    copies_commit();
  };

  Multiplier<T, C> multiplier(shared, tid);
  float sum[C::kMs][C::kNs][4] = {};
  multiply_steps(multiplier, sum, begin, end, 0, load, [&](int step) {
    if (kShortcut && step == main_steps && step > begin)
      rescale<C>(sum, p, channel + multiplier.warp_n, channel_end, multiplier.lane);
  });
  // Every split rescales its own part of the main range, so it may hold one range or both.
  if (kShortcut && end <= main_steps)
    rescale<C>(sum, p, channel + multiplier.warp_n, channel_end, multiplier.lane);
  copies_wait<0>();
  __syncthreads();  // the ring's memory becomes the epilogue's

  if (p.schedule.splits > 1 &&
      !add_splits<C>(sum, p, tile, split, tid, reinterpret_cast<unsigned*>(shared + C::kWord)))
    return;
  finish<T, C, kShortcut>(sum, p, reinterpret_cast<float*>(shared) + warp * 16 * C::kPitch,
                          pixel + multiplier.warp_m, pixels, channel + multiplier.warp_n,
                          channel_end, multiplier.lane);
}

}  // namespace resnet_fused::sm80
