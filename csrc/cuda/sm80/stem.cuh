// The stem's kernel: convolution, scale and shift, activation and max-pool of tiles, see stem.h.
//
// The weights are read once a block. A tile takes two barriers: its patch must have landed before
// the products, and its outputs must be complete before they are pooled; the copies of the next
// patch run while they are.
#pragma once

#include "cuda/sm80/stem_pool.cuh"

namespace resnet_fused::sm80 {

template <typename T, int kTile>
__global__ void __launch_bounds__(threads(kStemTiles[kTile]), kStemTiles[kTile].blocks_per_sm)
    stem_kernel(const __grid_constant__ StemParams p) {
  using C = StemConfig<kTile>;
  RF_DYNAMIC_SHARED(shared);
  const int thread = int(threadIdx.x), warp = thread >> 5, lane = thread & 31;
  const int warp_m = warp % C::kT.warps_m * 16 * C::kMs, warp_n = warp / C::kT.warps_m * C::kWarpN;
  const int channel = int(blockIdx.y) * kStemChannels;
  T* const patch = reinterpret_cast<T*>(shared);
  T* const weights = patch + p.layout.patch_rows * p.layout.pitch;
  T* const outputs = weights + kStemChannels * p.layout.weight_pitch;

  int tile = int(blockIdx.x);
  StemPlace place = place_of(p, tile, C::kT.rows);
  load_patch(p, patch, place, thread, C::kThreads);
  load_weights<T, C::kThreads / 32>(p, weights, channel, warp, lane);
#pragma unroll 1
  while (true) {
    copies_wait<0>();
    __syncthreads();  // the patch has landed for all, and all have pooled the tile before
    float sum[C::kMs][C::kNs][4] = {};
    multiply_stem<T, C>(sum, p, patch, weights, warp_m, warp_n, lane);
    activate_stem<T, C>(sum, p, outputs, channel, warp_m, warp_n, lane);
    __syncthreads();  // the outputs are complete, and all are done with the patch
    const StemPlace done = place;
    tile += int(gridDim.x);
    if (tile < p.tiles) {
      place = place_of(p, tile, C::kT.rows);
      load_patch(p, patch, place, thread, C::kThreads);
    }
    pool_stem<T, C>(p, outputs, done, channel, thread);
    if (tile >= p.tiles) break;
  }
}

}  // namespace resnet_fused::sm80
