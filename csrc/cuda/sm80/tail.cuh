// The tail's kernel, see tail.h: a convolution as in conv_kernel.cuh, but a warp keeps whole rows
// of channels; then the second product slice by slice.
//
// The first slice of weights takes the place in the ring that a step behind the last one would
// have. After the ring one barrier a slice is enough: behind it the slice has landed for all, and
// all are done with the one before, whose place the next one takes. What a warp's epilogue needs is
// its own.
#pragma once

#include "cuda/sm80/epilogue.cuh"
#include "cuda/sm80/loader.cuh"
#include "cuda/sm80/main_loop.cuh"
#include "cuda/sm80/tail_multiply.cuh"

namespace resnet_fused::sm80 {

// The residual is most of what a block reads, and it lies in one piece: it is on its way to L2
// while the first product runs. Only where what all resident blocks ask for fits there.
constexpr int kPrefetchChannels = 512;
template <int kPixels, int kThreads>
RF_DEVICE void prefetch_residual(const KernelParams& p, int pixel, int pixels, int tid) {
  if (p.residual == nullptr || p.problem.k > kPrefetchChannels) return;
  const int count = pixels - pixel < kPixels ? pixels - pixel : kPixels;
  const auto* const from =
      static_cast<const uint8_t*>(p.residual) + int64_t(pixel) * p.problem.k * 2;
  for (int i = tid * 128; i < count * p.problem.k * 2; i += kThreads * 128) prefetch(from + i);
}

template <typename T, int kTile>
__global__ void __launch_bounds__(threads(kTailTiles[kTile].tile), kTailTiles[kTile].blocks_per_sm)
    tail_kernel(const __grid_constant__ TailParams p) {
  using Shape = TailShape<T, kTile>;
  using C = typename Shape::C;
  using S = typename Shape::S;
  RF_DYNAMIC_SHARED(shared);
  const int tid = int(threadIdx.x), warp = tid >> 5;
  const int pixels = p.first.problem.n * p.first.out_h * p.first.out_w;
  const int pixel = int(blockIdx.x) * C::kPixels;
  const uint32_t shared_0 = shared_address(shared);

  Loader<T, C, false> loader(p.first, shared, tid, pixel, pixels, 0, 0, p.first.problem.k);
  loader.open(false, 0);
  prefetch_residual<C::kPixels, C::kThreads>(p.last, pixel, pixels, tid);
  Multiplier<T, C> multiplier(shared, tid);
  typename Shape::Between between;
  {
    const int steps = p.first.schedule.main_steps;
    // So that the step behind the last has stage 0, where the slices will be.
    const int first_stage = (C::kStages - steps % C::kStages) % C::kStages;
    float sum[C::kMs][C::kNs][4] = {};
    const auto load = [&](int step, int stage) {
      if (step < steps) {
        loader.load(stage);
      } else if (step == steps) {
        load_slice<T, Shape>(p.last, shared_0, 0, tid);
      }
      copies_commit();
    };
    multiply_steps(multiplier, sum, 0, steps, first_stage, load, [](int) {});
    activate_between<T, C>(sum, p.first, multiplier.lane, between);
  }

  float* const patch =
      reinterpret_cast<float*>(shared + tail_patches_at(C::kT)) + warp * 16 * S::kPitch;
  int place = 0;  // of this slice
#pragma unroll 1
  for (int channel = 0; channel < p.last.problem.k; channel += kSliceChannels) {
    copies_wait<0>();
    __syncthreads();  // this slice has landed for all, and all are done with what was before it
    const int next = channel + kSliceChannels;
    if (next < p.last.problem.k)
      load_slice<T, Shape>(p.last, shared_0 + (slice_bytes(C::kT) - place), next, tid);
    copies_commit();
    float sum[S::kMs][S::kNs][4] = {};
    multiply_slice<T, Shape>(sum, between, shared_0 + place, multiplier.lane);
    finish<T, S, false, true>(sum, p.last, patch, pixel + multiplier.warp_m, pixels, channel,
                              p.last.problem.k, multiplier.lane);
    place = slice_bytes(C::kT) - place;
  }
}

}  // namespace resnet_fused::sm80
