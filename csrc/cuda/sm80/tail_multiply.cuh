// The second product of a tail: the map between, which a thread holds in registers, by slices of
// weights, which come through shared memory.
#pragma once

#include "cuda/sm80/multiplier.cuh"
#include "cuda/sm80/tail.h"

namespace resnet_fused::sm80 {

// C: the first convolution's; S: a slice's, whose "pixels" are never in shared memory.
template <typename T, int kTile>
struct TailShape {
  struct First {
    static constexpr Tile kT = kTailTiles[kTile].tile;
    static constexpr bool kVector = true;
  };
  struct Slice {
    static constexpr Tile kT = slice_tile(First::kT);
    static constexpr bool kVector = true;
  };
  using C = TileConfig<T, Math::kTensor, First>;
  using S = TileConfig<T, Math::kTensor, Slice>;
  static constexpr int kSteps = C::kChannels / 16;  // of the tensor cores, along the map's channels
  static constexpr int kPanels = C::kChannels / kPanelChannels;
  static constexpr int kPanelBytes = kSliceChannels * S::kRowBytes;
  static_assert(C::kWarpN == C::kChannels && S::kWarpM == C::kWarpM, "warps keep their pixels");
  static_assert(C::kChannels % kPanelChannels == 0 && S::kRowBytes == 2 * kPanelChannels, "panels");
  static_assert(slice_bytes(C::kT) <= C::kStageBytes, "the first slice waits in a stage");
  // A thread's operands of the second product, as mma.sync takes them.
  using Between = uint32_t[C::kMs][kSteps][4];
};

// act(sum * scale + shift), rounded as it would be in memory. Two products of 8 channels side by
// side are the four words of one of 16: rows lane / 4 and 8 further, then both 8 channels further.
// Channels that are not there become zeros by choice: their sums may be 0 * Inf.
template <typename T, typename C, int kSteps>
RF_DEVICE void activate_between(const float (&sum)[C::kMs][C::kNs][4], const KernelParams& p,
                                int lane, uint32_t (&between)[C::kMs][kSteps][4]) {
#pragma unroll
  for (int j = 0; j < C::kNs; ++j) {
    const int channel = 8 * j + lane % 4 * 2;
    const bool has = channel < p.problem.k;
    const Affine low = has ? affine_of<false>(p, channel) : Affine{0.f, 0.f};
    const Affine high = has ? affine_of<false>(p, channel + 1) : Affine{0.f, 0.f};
#pragma unroll
    for (int i = 0; i < C::kMs; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float a = fmaf(sum[i][j][2 * h], low.scale, low.shift);
        float b = fmaf(sum[i][j][2 * h + 1], high.scale, high.shift);
        if (p.relu) {
          a = relu_keeping_nan(a);
          b = relu_keeping_nan(b);
        }
        between[i][j / 2][j % 2 * 2 + h] = has ? pack(a, b, T()) : 0u;
      }
  }
}

// Starts a thread's copies of the slice of weights that begins at output channel `first`; zeros
// where there are none.
template <typename T, typename Shape>
RF_DEVICE void load_slice(const KernelParams& p, uint32_t to, int first, int tid) {
  using S = typename Shape::S;
  const int chunk = tid % S::kChunks, row = tid / S::kChunks;
  const int length = p.problem.c;
  const T* const weight = static_cast<const T*>(p.weight) + int64_t(first + row) * length;
#pragma unroll
  for (int panel = 0; panel < Shape::kPanels; ++panel) {
    const int k = panel * kPanelChannels + chunk * S::kElements;
#pragma unroll
    for (int i = 0; i < S::kChannelRows; ++i)
      copy_16(
          to + panel * Shape::kPanelBytes + S::swizzle(row, chunk) + i * (S::kRows * S::kRowBytes),
          weight + int64_t(i * S::kRows) * length + k,
          k < length && first + row + i * S::kRows < p.problem.k);
  }
}

// sum += between * slice, whose weights lie at `from`.
template <typename T, typename Shape>
RF_DEVICE void multiply_slice(float (&sum)[Shape::S::kMs][Shape::S::kNs][4],
                              const typename Shape::Between& between, uint32_t from, int lane) {
  using S = typename Shape::S;
  const uint32_t part = Multiplier<T, S>::channel_row(0, lane);
  uint32_t b[2][S::kNs / 2][4];  // one half is read while the other multiplies
  const auto fetch = [&](int step, int half) {
    const uint32_t at = from + step / 4 * Shape::kPanelBytes + (part ^ (step % 4 << 5));
#pragma unroll
    for (int j = 0; j < S::kNs / 2; ++j) load_matrices(b[half][j], at + j * (16 * S::kRowBytes));
  };
  fetch(0, 0);
#pragma unroll
  for (int step = 0; step < Shape::kSteps; ++step) {
    if (step + 1 < Shape::kSteps) fetch(step + 1, (step + 1) & 1);
#pragma unroll
    for (int i = 0; i < S::kMs; ++i)
#pragma unroll
      for (int j = 0; j < S::kNs; ++j)
        multiply(sum[i][j], between[i][step], &b[step & 1][j / 2][j % 2 * 2], T());
  }
}

}  // namespace resnet_fused::sm80
