// The mean over an image's map, and a linear layer: head.h. Sums are in float32 and always in the
// same order, each result is rounded once.
#pragma once

#include "cuda/sm80/config.cuh"
#include "cuda/sm80/head.h"

namespace resnet_fused::sm80 {

// For launches that may overlap the kernel before (launch_head.cpp): returns when it has ended.
RF_DEVICE void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Behind the wait: the next kernel may start, and when this one has ended, so has all before it.
RF_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Sixteen bytes as they lie in memory: elements would be unpacked, to a register each, when they
// arrive.
struct alignas(16) HeadWords {
  uint32_t v[4];
};
template <typename T>
RF_DEVICE Vector<T> unpack(const HeadWords& words) {
  Vector<T> elements;
  __builtin_memcpy(&elements, &words, 16);
  return elements;
}

// A block for 128 bytes of an image's channels. Eight lanes read them of one pixel, the block those
// of 32 pixels at a time.
template <typename T>
__global__ void __launch_bounds__(kHeadThreads) pool_kernel(const __grid_constant__ Pool p) {
  constexpr int kElements = 16 / int(sizeof(T)), kLoads = 8;  // kLoads: in flight
  constexpr int kPixels = kHeadThreads / kPoolVectors, kChannels = kPoolVectors * kElements;
  RF_DYNAMIC_SHARED(shared);
  float* const sums = reinterpret_cast<float*>(shared);  // [warps][channels]
  const int vectors = p.channels / kElements, tid = int(threadIdx.x);
  const int image = int(blockIdx.x), chunk = int(blockIdx.y);
  const int vector = chunk * kPoolVectors + tid % kPoolVectors, first = tid / kPoolVectors;
  const HeadWords* x =
      static_cast<const HeadWords*>(p.x) + (int64_t(image) * p.pixels + first) * vectors + vector;
  const int64_t step = int64_t(kPixels) * vectors;
  wait_for_kernel_before();
  let_next_kernel_start();

  float sum[kElements] = {};
  if (vector < vectors)
    for (int left = p.pixels - first; left > 0; left -= kLoads * kPixels) {
      HeadWords in[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i, x += step)
        if (i * kPixels < left) in[i] = *x;
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (i * kPixels < left) {
          const Vector<T> pixel = unpack<T>(in[i]);
#pragma unroll
          for (int e = 0; e < kElements; ++e) sum[e] += to_float(pixel.v[e]);
        }
    }
#pragma unroll
  for (int other = 16; other >= kPoolVectors; other /= 2)
#pragma unroll
    for (int e = 0; e < kElements; ++e) sum[e] += __shfl_xor_sync(~0u, sum[e], other);
  if (tid % 32 < kPoolVectors)
#pragma unroll
    for (int e = 0; e < kElements; e += 4)
      *reinterpret_cast<Float4*>(sums + tid / 32 * kChannels + tid % 32 * kElements +
                                 e) = {{sum[e], sum[e + 1], sum[e + 2], sum[e + 3]}};
  __syncthreads();
  const int channel = chunk * kChannels + tid;
  if (tid >= kChannels || channel >= p.channels) return;
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < kHeadWarps; ++warp) total += sums[warp * kChannels + tid];
  static_cast<T*>(p.y)[int64_t(image) * p.channels + channel] =
      from_float<T>(total / float(p.pixels));
}

template <typename T>
RF_DEVICE float products(const HeadWords& left, const HeadWords& right) {
  const Vector<T> a = unpack<T>(left), b = unpack<T>(right);
  float sum[2] = {};
#pragma unroll
  for (int e = 0; e < 16 / int(sizeof(T)); ++e)
    sum[e % 2] = fmaf(to_float(a.v[e]), to_float(b.v[e]), sum[e % 2]);
  return sum[0] + sum[1];
}

// A warp for an output of kImages images. What it loads at once is all that it needs of one image
// of a ResNet-18 or -50 in 16 bits. The weights, which other layers have pushed out, come to L2
// while the kernel before runs; that is where all writes meet, so that what it may still write is
// not missed.
template <typename T, int kImages>
__global__ void __launch_bounds__(kHeadThreads, 2) linear_kernel(const __grid_constant__ Linear p) {
  constexpr int kLoads = kImages == 1 ? 8 : 4, kLine = 128 / 16;
  const int vectors = p.inputs / (16 / int(sizeof(T))), lane = int(threadIdx.x) % 32;
  const int output = int(blockIdx.x) * kHeadWarps + int(threadIdx.x) / 32;
  if (output >= p.outputs) return;
  const HeadWords* row = static_cast<const HeadWords*>(p.weight) + int64_t(output) * vectors + lane;
  const int first = int(blockIdx.y) * kImages;
  const HeadWords* x[kImages];
#pragma unroll
  for (int i = 0; i < kImages; ++i) {  // beyond the last image, that one again
    const int image = i == 0 || first + i < p.images ? first + i : p.images - 1;
    x[i] = static_cast<const HeadWords*>(p.x) + int64_t(image) * vectors + lane;
  }
  if (blockIdx.y == 0)
#pragma unroll 1
    for (int at = lane * kLine; at < vectors; at += 32 * kLine) prefetch(row - lane + at);
  wait_for_kernel_before();

  T bias;
  if (p.bias) bias = static_cast<const T*>(p.bias)[output];  // not to be waited for yet
  float sum[kImages] = {};
  // From where a lane's vectors lie, the loads are at constant offsets.
  for (int left = vectors - lane; left > 0; left -= 32 * kLoads, row += 32 * kLoads) {
    HeadWords weights[kLoads], in[kImages][kLoads];
#pragma unroll
    for (int v = 0; v < kLoads; ++v)
      if (32 * v < left) {
        weights[v] = row[32 * v];
#pragma unroll
        for (int i = 0; i < kImages; ++i) in[i][v] = x[i][32 * v];
      }
#pragma unroll
    for (int v = 0; v < kLoads; ++v)
      if (32 * v < left)
#pragma unroll
        for (int i = 0; i < kImages; ++i) sum[i] += products<T>(weights[v], in[i][v]);
#pragma unroll
    for (int i = 0; i < kImages; ++i) x[i] += 32 * kLoads;
  }
#pragma unroll
  for (int i = 0; i < kImages; ++i) {
#pragma unroll
    for (int other = 16; other; other /= 2) sum[i] += __shfl_xor_sync(~0u, sum[i], other);
    if (lane == 0 && first + i < p.images)
      static_cast<T*>(p.y)[int64_t(first + i) * p.outputs + output] =
          from_float<T>(p.bias ? sum[i] + to_float(bias) : sum[i]);
  }
}

}  // namespace resnet_fused::sm80
