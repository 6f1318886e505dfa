// From accumulators to the output: y = act(sum * scale + shift + residual), in float32, 16 bytes a
// thread, without shared memory.
//
// A thread's accumulators are pairs of neighbouring columns. With pixels on M those are channels,
// and a 4 x 4 transposition of words among the four lanes of a quad gives each lane eight channels
// of one pixel. With channels on M movmatrix turns the 8 x 8 blocks first. The residual comes in
// the same way, backwards. Both are registers only, so that one warpgroup's epilogue disturbs
// nothing that the other's sums need; the shared-memory way would need a staging buffer per
// warpgroup.
#pragma once

#include "cuda/sm90/shortcut.cuh"

namespace resnet_fused::sm90 {

// Lane q, word i receives lane i's word q, within each quad of lanes. Its own inverse.
RF_DEVICE void quad_transpose(uint32_t (&w)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    if (odd) {
      w[i] = got;
    } else {
      w[i + 1] = got;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + 2], 2);
    if (upper) {
      w[i] = got;
    } else {
      w[i + 2] = got;
    }
  }
}

// Where a vector of eight channels is in y and in the residual; negative outside the tensor.
RF_DEVICE int64_t offset_of(const Schedule& s, int pixel, int channel) {
  return pixel < s.pixels && channel < s.k ? int64_t(pixel) * s.k + channel : -1;
}
template <typename T>
RF_DEVICE void load_residual(uint32_t (&w)[4], const KernelParams& p, int64_t offset) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (p.residual && offset >= 0) v = load_once(static_cast<const T*>(p.residual) + offset);
  w[0] = v.x;
  w[1] = v.y;
  w[2] = v.z;
  w[3] = v.w;
}
template <typename T>
RF_DEVICE void store(const uint32_t (&w)[4], const KernelParams& p, int64_t offset) {
  if (offset >= 0) store_16(static_cast<T*>(p.y) + offset, make_uint4(w[0], w[1], w[2], w[3]));
}
RF_DEVICE float finish(float sum, const Affine& a, float residual, bool relu) {
  const float v = fmaf(sum, a.scale, a.shift) + residual;
  return relu ? relu_keeping_nan(v) : v;
}

// Of a warpgroup's next share of a tile, whose first pixel and channel these are: the residual
// comes from memory while other tiles are summed. A load that waits for memory takes three times as
// long as one that finds L2 ready, and the epilogue's loads come in few rounds: on an H100 the
// residual of 64 channels of 56 x 56 cost 43 us at batch 128, 17 of them for its bytes.
template <typename T, int kPixels, int kChannels>
RF_DEVICE void prefetch_residual(const KernelParams& p, int pixel, int channel, int tid) {
  constexpr int kLines = (kChannels + 63) / 64;  // of 128 bytes
  if (!p.residual) return;
#pragma unroll 1
  for (int i = tid; i < kPixels * kLines; i += 128) {
    const int64_t at = offset_of(p.schedule, pixel + i / kLines, channel + 64 * (i % kLines));
    if (at >= 0) prefetch_to_l2(static_cast<const T*>(p.residual) + at);
  }
}

// One warpgroup's share of a tile whose first pixel and channel these are.
template <typename T, typename C, bool kShortcut>
RF_DEVICE void store_pixels_on_m(const float (&sum)[C::kMBlocks][C::kN / 2], const KernelParams& p,
                                 int pixel, int channel, int tid) {
  constexpr int kHalves = 2 * C::kMBlocks;  // of 64 rows: eight pixels each warp
  const int lane = tid & 31;
#pragma unroll
  for (int j = 0; j < C::kN / 32; ++j) {
    if (channel + 32 * j >= p.schedule.k) break;
    uint32_t w[kHalves][4];
    int64_t offset[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const Vector v = vector_pixels_on_m(tid, h & 1, j);
      offset[h] = offset_of(p.schedule, pixel + 64 * (h >> 1) + v.pixel, channel + v.channel);
      load_residual<T>(w[h], p, offset[h]);
    }
    Affine even[4], odd[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int c = channel + fragment_column(tid, 4 * (4 * j + i));
      even[i] = affine_of<kShortcut>(p, c);
      odd[i] = affine_of<kShortcut>(p, c + 1);
    }
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      if (p.residual) quad_transpose(w[h], lane);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const s = &sum[h >> 1][4 * (4 * j + i) + 2 * (h & 1)];
        const float2 r = Pair<T>::unpack(w[h][i]);
        w[h][i] =
            Pair<T>::pack(finish(s[0], even[i], r.x, p.relu), finish(s[1], odd[i], r.y, p.relu));
      }
      quad_transpose(w[h], lane);
      store<T>(w[h], p, offset[h]);
    }
  }
}

template <typename T, typename C, bool kShortcut>
RF_DEVICE void store_channels_on_m(const float (&sum)[C::kMBlocks][C::kN / 2],
                                   const KernelParams& p, int pixel, int channel, int tid) {
  constexpr int kGroup = (C::kN / 16) % 4 ? 2 : 4;  // residual vectors in flight
  const int lane = tid & 31;
#pragma unroll
  for (int m = 0; m < C::kMBlocks; ++m) {
    Affine affine[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      affine[half] = affine_of<kShortcut>(p, channel + 64 * m + fragment_row(tid, 2 * half));
#pragma unroll
    for (int j = 0; j < C::kN / 16; j += kGroup) {
      if (pixel + 16 * j >= p.schedule.pixels) break;
      uint32_t w[kGroup][4];
      int64_t offset[kGroup];
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        const Vector v = vector_channels_on_m(tid, j + g);
        offset[g] = offset_of(p.schedule, pixel + v.pixel, channel + 64 * m + v.channel);
        load_residual<T>(w[g], p, offset[g]);
      }
#pragma unroll
      for (int g = 0; g < kGroup; ++g) {
        if (p.residual) quad_transpose(w[g], lane);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* const s = &sum[m][4 * (2 * (j + g) + (i >> 1)) + 2 * (i & 1)];
          float2 r = make_float2(0.f, 0.f);
          if (p.residual) r = Pair<T>::unpack(transpose_8x8(w[g][i]));
          w[g][i] = transpose_8x8(Pair<T>::pack(finish(s[0], affine[i & 1], r.x, p.relu),
                                                finish(s[1], affine[i & 1], r.y, p.relu)));
        }
        quad_transpose(w[g], lane);
        store<T>(w[g], p, offset[g]);
      }
    }
  }
}

}  // namespace resnet_fused::sm90
