// The mean over an image's map, then the products with `block_classes` rows of the weights: head.h.
//
// What it waits for is memory, so everything is asked for early: the weights to come to L2, where a
// ResNet-50 has pushed them out, while the kernel before still runs; then a warp's first eight
// loads of them (all that it needs for one image of a ResNet-18 or -50), and seven pixels a thread.
// Sums are in float32 and always in the same order. The mean is rounded as PyTorch's, whose linear
// layer reads it.
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

// Where a lane is in the rows of its warp, 32 vectors at a time.
struct HeadStep {
  int row, vector;

  // Whether that was the last of the row.
  RF_DEVICE bool advance(int vectors) {
    vector += 32;
    if (vector - int(threadIdx.x % 32) < vectors) return false;
    vector = threadIdx.x % 32;
    row += kHeadWarps;
    return true;
  }
};

// The sums of a block's groups, one row of channels each.
template <typename T>
RF_DEVICE void head_sums(const HeadWords* image, int pixels, int vectors, int groups, float* sums) {
  constexpr int kElements = 16 / int(sizeof(T)), kLoads = 7;  // kLoads: in flight
  const int width = vectors < kHeadThreads ? vectors : kHeadThreads;
  const int group = int(threadIdx.x) / width;
  if (group >= groups) return;
  for (int v = int(threadIdx.x) % width; v < vectors; v += width) {
    float sum[kElements] = {};
    for (int from = group; from < pixels; from += kLoads * groups) {
      HeadWords in[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (from + i * groups < pixels) in[i] = image[int64_t(from + i * groups) * vectors + v];
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        if (from + i * groups < pixels) {
          const Vector<T> pixel = unpack<T>(in[i]);
#pragma unroll
          for (int e = 0; e < kElements; ++e) sum[e] += to_float(pixel.v[e]);
        }
    }
#pragma unroll
    for (int e = 0; e < kElements; e += 4)
      *reinterpret_cast<Float4*>(sums + (int64_t(group) * vectors + v) * kElements +
                                 e) = {{sum[e], sum[e + 1], sum[e + 2], sum[e + 3]}};
  }
}

template <typename T>
RF_DEVICE float head_products(const HeadWords& left, const HeadWords& right) {
  const Vector<T> a = unpack<T>(left), b = unpack<T>(right);
  float sum[2] = {};
#pragma unroll
  for (int e = 0; e < 16 / int(sizeof(T)); ++e)
    sum[e % 2] = fmaf(to_float(a.v[e]), to_float(b.v[e]), sum[e % 2]);
  return sum[0] + sum[1];
}

template <typename T>
__global__ void __launch_bounds__(kHeadThreads) head_kernel(const __grid_constant__ Head p) {
  constexpr int kElements = 16 / int(sizeof(T)), kAhead = 8, kLine = 128 / 16;
  RF_DYNAMIC_SHARED(shared);
  const int vectors = p.channels / kElements, groups = head_groups(p.channels, int(sizeof(T)));
  float* const sums = reinterpret_cast<float*>(shared);
  T* const mean = reinterpret_cast<T*>(sums + groups * p.channels);
  const int64_t image = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const int first = int(blockIdx.x) * p.block_classes;
  const int end = first + p.block_classes < p.classes ? first + p.block_classes : p.classes;
  const HeadWords* const weight = static_cast<const HeadWords*>(p.weight);
  // L2 is where all writes meet: what the kernel before may still write is not missed there.
  if (image == 0)
#pragma unroll 1
    for (int64_t at = int64_t(first) * vectors + threadIdx.x * kLine; at < int64_t(end) * vectors;
         at += kHeadThreads * kLine)
      prefetch(weight + at);
  wait_for_kernel_before();

  HeadStep next{first + int(threadIdx.x) / 32, lane}, step = next;
  const auto load = [&](HeadWords& to) {
    if (next.row < end && next.vector < vectors)
      to = weight[int64_t(next.row) * vectors + next.vector];
    next.advance(vectors);
  };
  const auto bias_of = [&](int row) {
    return p.bias && row < end ? to_float(static_cast<const T*>(p.bias)[row]) : 0.f;
  };
  HeadWords ahead[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(ahead[i]);
  float bias = bias_of(step.row);

  head_sums<T>(static_cast<const HeadWords*>(p.x) + image * p.pixels * vectors, p.pixels, vectors,
               groups, sums);
  __syncthreads();
  for (int c = threadIdx.x; c < p.channels; c += kHeadThreads) {
    float sum = 0.f;
#pragma unroll 4
    for (int group = 0; group < groups; ++group) sum += sums[group * p.channels + c];
    mean[c] = from_float<T>(sum / float(p.pixels));
  }
  __syncthreads();
  if (blockIdx.x == 0)
    for (int v = threadIdx.x; v < vectors; v += kHeadThreads)
      static_cast<HeadWords*>(p.pooled)[image * vectors + v] =
          reinterpret_cast<const HeadWords*>(mean)[v];

  float sum = 0.f;
  while (step.row < end) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (step.row >= end) break;
      if (step.vector < vectors)
        sum += head_products<T>(ahead[i], reinterpret_cast<const HeadWords*>(mean)[step.vector]);
      load(ahead[i]);
      const int row = step.row;
      if (!step.advance(vectors)) continue;
#pragma unroll
      for (int other = 16; other; other /= 2) sum += __shfl_xor_sync(~0u, sum, other);
      if (lane == 0) static_cast<T*>(p.y)[image * p.classes + row] = from_float<T>(sum + bias);
      bias = bias_of(step.row);
      sum = 0.f;
    }
  }
}

}  // namespace resnet_fused::sm80
