// y = relu(a + b), the sum in float32, NaN passes. It is bound by memory: 16 bytes a thread and
// access, a grid of one wave that strides over the rest.
#pragma once

#include "cuda/sm80/config.cuh"
#include "cuda/sm80/pointwise.h"

namespace resnet_fused::sm80 {

template <typename T>
RF_DEVICE T add_relu(T a, T b) {
  return from_float<T>(relu_keeping_nan(to_float(a) + to_float(b)));
}

// aligned: all three are, to 16 bytes; else elements are loaded one by one.
template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads)
    add_relu_kernel(const T* a, const T* b, T* y, int64_t count, bool aligned) {
  constexpr int kElements = 16 / int(sizeof(T));
  const int64_t thread = int64_t(blockIdx.x) * kPointwiseThreads + threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * kPointwiseThreads;
  const int64_t vectors = aligned ? count / kElements : 0;
  for (int64_t i = thread; i < vectors; i += step) {
    const Vector<T> left = reinterpret_cast<const Vector<T>*>(a)[i];
    const Vector<T> right = reinterpret_cast<const Vector<T>*>(b)[i];
    Vector<T> sum;
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum.v[e] = add_relu(left.v[e], right.v[e]);
    reinterpret_cast<Vector<T>*>(y)[i] = sum;
  }
  for (int64_t i = vectors * kElements + thread; i < count; i += step) y[i] = add_relu(a[i], b[i]);
}

}  // namespace resnet_fused::sm80
