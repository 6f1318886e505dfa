// y = act(x * scale + shift + residual), in float32, NaN passes the ReLU. It is bound by memory: 16
// bytes a thread and access, and a grid of one wave that strides over the rest.
//
// Scale and shift must not cost what x does. A thread whose channels stay the same from stride to
// stride reads them once, which the powers of two of a ResNet give; else once a vector, from L1.
#pragma once

#include "cuda/sm80/config.cuh"
#include "cuda/sm80/scale_shift.h"

namespace resnet_fused::sm80 {

template <int kCount>
struct ChannelAffine {
  float scale[kCount], shift[kCount];

  RF_DEVICE void read(const ScaleShift& p, int channel) {
#pragma unroll
    for (int e = 0; e < kCount; e += 4) {
      const Float4 s = *reinterpret_cast<const Float4*>(p.scale + channel + e);
      const Float4 t = *reinterpret_cast<const Float4*>(p.shift + channel + e);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scale[e + i] = s.v[i];
        shift[e + i] = t.v[i];
      }
    }
  }
};

template <typename T>
RF_DEVICE T scale_shift(T x, float scale, float shift, bool adds, T residual, bool relu) {
  float v = fmaf(to_float(x), scale, shift);
  if (adds) v += to_float(residual);
  return from_float<T>(relu ? relu_keeping_nan(v) : v);
}

template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads)
    scale_shift_kernel(const __grid_constant__ ScaleShift p) {
  constexpr int kElements = 16 / int(sizeof(T));
  const int64_t thread = int64_t(blockIdx.x) * kPointwiseThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kPointwiseThreads;
  const T* const x = static_cast<const T*>(p.x);
  const T* const residual = static_cast<const T*>(p.residual);
  T* const y = static_cast<T*>(p.y);
  const int each = p.aligned ? kElements : 1;  // elements a thread and step
  int channel = int(thread * each % p.channels);
  const int advance = int(step * each % p.channels);
  const auto next_channel = [&] {
    channel += advance;
    if (channel >= p.channels) channel -= p.channels;
  };
  if (!p.aligned) {
    for (int64_t i = thread; i < p.count; i += step, next_channel())
      y[i] =
          scale_shift<T>(x[i], __ldg(p.scale + channel), __ldg(p.shift + channel),
                         residual != nullptr, residual ? residual[i] : from_float<T>(0.f), p.relu);
    return;
  }
  ChannelAffine<kElements> affine;
  affine.read(p, channel);
  for (int64_t i = thread; i < p.count / kElements; i += step) {
    const Vector<T> in = reinterpret_cast<const Vector<T>*>(x)[i];
    Vector<T> other = {}, out;
    if (residual) other = reinterpret_cast<const Vector<T>*>(residual)[i];
#pragma unroll
    for (int e = 0; e < kElements; ++e)
      out.v[e] = scale_shift<T>(in.v[e], affine.scale[e], affine.shift[e], residual != nullptr,
                                other.v[e], p.relu);
    reinterpret_cast<Vector<T>*>(y)[i] = out;
    if (advance) {
      next_channel();
      affine.read(p, channel);
    }
  }
}

}  // namespace resnet_fused::sm80
