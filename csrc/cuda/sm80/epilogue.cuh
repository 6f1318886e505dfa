// From sums to the output: y = act(sum * scale + shift + residual), in float32, 16 bytes a thread.
//
// A warp turns 16 pixels at a time through a patch of shared memory of its own, so that a lane gets
// whole vectors of channels; a lane's channels are the same in all of its vectors.
#pragma once

#include "cuda/sm80/shortcut.cuh"

namespace resnet_fused::sm80 {

// kWhole: channels are known to come in whole aligned vectors.
template <typename T, typename C, bool kShortcut, bool kWhole = false>
RF_DEVICE void finish(const float (&sum)[C::kMs][C::kNs][4], const KernelParams& p, float* patch,
                      int pixel, int pixels, int channel, int channel_end, int lane) {
  constexpr int kVectors = C::kWarpN / C::kElements;  // of a pixel
  const int column = lane % kVectors * C::kElements, k = channel + column;
  const int K = p.problem.k, valid = channel_end - k;
  const bool whole = kWhole || (K | channel | channel_end) % C::kElements == 0;  // and aligned
  Affine affine[C::kElements];
#pragma unroll
  for (int e = 0; e < C::kElements; ++e)
    affine[e] = e < valid ? affine_of<kShortcut>(p, k + e) : Affine{0.f, 0.f};
#pragma unroll
  for (int i = 0; i < C::kMs; ++i) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < C::kNs; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<float2*>(patch + (lane / 4 + 8 * h) * C::kPitch + 8 * j + lane % 4 * 2) =
            make_float2(sum[i][j][2 * h], sum[i][j][2 * h + 1]);
    __syncwarp();
#pragma unroll
    for (int row = lane / kVectors; row < 16; row += 32 / kVectors) {
      const int m = pixel + 16 * i + row;
      if (m >= pixels || valid <= 0) continue;
      const int64_t at = int64_t(m) * K + k;
      T* const y = static_cast<T*>(p.y) + at;
      Vector<T> out, other = {};
      if (p.residual) {
        const T* const residual = static_cast<const T*>(p.residual) + at;
        if (whole) {
          other = *reinterpret_cast<const Vector<T>*>(residual);
        } else {
          for (int e = 0; e < C::kElements && e < valid; ++e) other.v[e] = residual[e];
        }
      }
      float f[C::kElements];
#pragma unroll
      for (int e = 0; e < C::kElements; e += 4)
        *reinterpret_cast<Float4*>(f + e) =
            *reinterpret_cast<const Float4*>(patch + row * C::kPitch + column + e);
#pragma unroll
      for (int e = 0; e < C::kElements; ++e) {
        float v = fmaf(f[e], affine[e].scale, affine[e].shift);
        if (p.residual) v += to_float(other.v[e]);
        out.v[e] = from_float<T>(p.relu ? relu_keeping_nan(v) : v);
      }
      if (whole) {
        *reinterpret_cast<Vector<T>*>(y) = out;
      } else {
        for (int e = 0; e < C::kElements && e < valid; ++e) y[e] = out.v[e];
      }
    }
  }
}

}  // namespace resnet_fused::sm80
