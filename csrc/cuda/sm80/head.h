// What follows the last block of a ResNet, for a few images: the mean over the map and a linear
// layer, in one kernel.
//
// PyTorch's two take 8 to 9 us within a CUDA graph of an H100, for 1 to 128 images; a kernel that
// does nothing, 2. Every block makes the whole mean of an image for itself: no block waits for
// another, but the map is read as often as an image has blocks. Bytes decide how many: from L2 a
// multiprocessor gets about 0.1 MB a microsecond and all together 5.5 MB, what some 50 of them
// take. So about 64 blocks in all; for the 1000 classes of a ResNet-18's image 63 of 16 classes,
// which read 65 KB each and 4 MB together.
#pragma once

#include "cuda/sm80/plan.h"

struct CUstream_st;

namespace resnet_fused::sm80 {

struct HeadProblem {
  int64_t images, pixels, channels, classes;
};

struct Head {
  const void* x;       // [images][pixels][channels]
  const void* weight;  // [classes][channels]
  const void* bias;    // [classes], or null
  void* pooled;        // [images][channels]
  void* y;             // [images][classes]
  int pixels, channels, classes;
  int block_classes;  // a multiple of kHeadWarps
};

constexpr int kHeadThreads = 512, kHeadWarps = kHeadThreads / 32;

// Empty, or the sentence why the kernel cannot serve, or would not be faster than PyTorch's.
// Pointers must be multiples of 16 bytes.
std::string head_refuses(const HeadProblem& p, Type type);
// The rest is for what is not refused.
int head_block_classes(const HeadProblem& p);
int head_blocks(const HeadProblem& p);  // of an image
// Threads that share a pixel's channels, 16 bytes each, are a group; the groups share the pixels.
RF_HD int head_groups(int channels, int element_bytes) {
  const int vectors = channels * element_bytes / 16;
  return vectors < kHeadThreads ? kHeadThreads / vectors : 1;
}
// Each group's sums, and the mean.
RF_HD int head_shared_bytes(int channels, int element_bytes) {
  return (head_groups(channels, element_bytes) * 4 + element_bytes) * channels;
}

// On the current device. Empty, or why the kernel did not start. Safe in CUDA graph capture. The
// sizes in `o` are taken from p.
std::string launch_head(const HeadProblem& p, Type type, Head o, CUstream_st* stream);

const void* head_bfloat16();
const void* head_float16();
const void* head_float32();

}  // namespace resnet_fused::sm80
