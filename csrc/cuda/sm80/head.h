// What follows the last block of a ResNet, for a few images: the mean over the map, and a linear
// layer, a small kernel each.
//
// PyTorch's two take 8 to 9 us within a CUDA graph of an H100, for 1 to 128 images, and a kernel
// that does nothing 2: what costs is not work, but waiting for one thing after another. So many
// blocks share the map and the weights (an image of a ResNet-18 has 8 blocks and then 125), each
// thread's loads are in flight at once, and each kernel may start while the one before still runs.
#pragma once

#include "cuda/sm80/plan.h"

struct CUstream_st;

namespace resnet_fused::sm80 {

// Dense; pointers at multiples of 16 bytes, channels and inputs in multiples of as many.
struct Pool {
  const void* x;  // [images][pixels][channels]
  void* y;        // [images][channels]
  int pixels, channels;
};
struct Linear {
  const void* x;       // [images][inputs]
  const void* weight;  // [outputs][inputs]
  const void* bias;    // [outputs], or null
  void* y;             // [images][outputs]
  int images, inputs, outputs;
};

constexpr int kHeadThreads = 256, kHeadWarps = kHeadThreads / 32;
// Of a pixel's channels, 128 bytes a block.
constexpr int kPoolVectors = 8;
// The images that share a warp's loads of weights: one, or up to so many.
constexpr int kLinearImages = 4;

RF_HD int pool_chunks(int channels, int element_bytes) {
  return ceil_div(channels * element_bytes, 16 * kPoolVectors);
}
// The warps' sums.
RF_HD int pool_shared_bytes(int element_bytes) {
  return kHeadWarps * kPoolVectors * 16 / element_bytes * 4;
}

// On the current device. Empty, or why the kernel did not start. Safe in CUDA graph capture.
// At least one image, pixel, channel and output.
std::string launch_pool(Type type, const Pool& p, int images, CUstream_st* stream);
std::string launch_linear(Type type, const Linear& p, CUstream_st* stream);

const void* pool_kernel_of(Type type);
const void* linear_kernel_of(Type type, bool one_image);

}  // namespace resnet_fused::sm80
