// Shared memory to registers, and the products of one stage.
//
// A warp owns kMs x kNs products of 16 pixels by 8 channels. In every way to multiply a thread
// holds the same four sums of each: pixels lane / 4 and lane / 4 + 8, channels lane % 4 * 2 and the
// next.
#pragma once

#include "cuda/sm80/config.cuh"

namespace resnet_fused::sm80 {

template <typename T, typename C>
struct Multiplier {
  using Sums = float[C::kMs][C::kNs][4];

  uint8_t* const shared;
  const uint32_t shared_0;
  const int lane, warp_m, warp_n;
  uint32_t pixel_part, channel_part;
  uint32_t a[2][C::kMs][4], b[2][C::kNs / 2][4];  // one half is read while the other multiplies

  RF_DEVICE Multiplier(uint8_t* memory, int tid)
      : shared(memory),
        shared_0(shared_address(memory)),
        lane(tid & 31),
        warp_m((tid >> 5) % C::kWarpsM * C::kWarpM),
        warp_n((tid >> 5) / C::kWarpsM * C::kWarpN) {
    // Matrices of a: rows 0-7, rows 8-15, then both one chunk further.
    pixel_part = C::swizzle(warp_m + (lane & 15), lane >> 4);
    channel_part = channel_row(warp_n, lane) + C::kPixelBytes;
  }
  // Matrices of b: channels 0-7 at this chunk and the next, then channels 8-15.
  static RF_DEVICE uint32_t channel_row(int channel, int lane) {
    return C::swizzle(channel + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  }

  // `step`: 32 bytes of the reduction.
  RF_DEVICE void fetch(int stage, int step, int half) {
    const uint32_t from = shared_0 + stage * C::kStageBytes;
#pragma unroll
    for (int i = 0; i < C::kMs; ++i)
      fetch_4(a[half][i], from + (pixel_part ^ (step << 5)) + i * (16 * C::kRowBytes));
#pragma unroll
    for (int j = 0; j < C::kNs / 2; ++j)
      fetch_4(b[half][j], from + (channel_part ^ (step << 5)) + j * (16 * C::kRowBytes));
  }
  RF_DEVICE void products(Sums& sum, int half) {
#pragma unroll
    for (int i = 0; i < C::kMs; ++i)
#pragma unroll
      for (int j = 0; j < C::kNs; ++j)
        multiply(sum[i][j], a[half][i], &b[half][j / 2][j % 2 * 2], T());
  }
  // A stage by FMA units, four elements of the reduction at a time.
  RF_DEVICE void multiply_stage(Sums& sum, int stage) {
    const uint8_t* const from = shared + stage * C::kStageBytes;
#pragma unroll 1
    for (int chunk = 0; chunk < C::kChunks; ++chunk) {
      Float4 pixels[C::kMs][2];
#pragma unroll
      for (int i = 0; i < C::kMs; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          pixels[i][h] = *reinterpret_cast<const Float4*>(
              from + C::swizzle(warp_m + 16 * i + 8 * h + lane / 4, chunk));
#pragma unroll
      for (int j = 0; j < C::kNs; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Float4 channel = *reinterpret_cast<const Float4*>(
              from + C::kPixelBytes + C::swizzle(warp_n + 8 * j + lane % 4 * 2 + e, chunk));
#pragma unroll
          for (int i = 0; i < C::kMs; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
              for (int d = 0; d < 4; ++d)
                sum[i][j][2 * h + e] = fmaf(pixels[i][h].v[d], channel.v[d], sum[i][j][2 * h + e]);
        }
    }
  }

 private:
  RF_DEVICE void fetch_4(uint32_t (&r)[4], uint32_t address) {
    load_matrices(r, address);
    if constexpr (C::kMath == Math::kTf32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = round_to_tf32(r[i]);
    }
  }
};

}  // namespace resnet_fused::sm80
