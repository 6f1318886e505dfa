// A residual block on raw pointers, its intermediates in memory that the calling thread keeps:
//
//   y = act(conv_n(... conv_1(x)) + shortcut(x))        shortcut: the identity or a convolution
//
// The last convolution adds the shortcut in its epilogue. A convolution on the shortcut runs in the
// parallel region of conv_1. Large maps go through the block a few images at a time, so that what
// one convolution wrote is still in the cache when the next one reads it: images_at_once has the
// rule and its measurements.
#pragma once

#include <cstdint>

#include "conv.h"

namespace resnet_fused {

struct BlockConv {
  ConvShape shape;
  Plan plan;  // any but kTorch
  bool relu;
  const float* packed;
  const float* scale;
  const float* shift;
  int64_t packed_bytes;
};

// x, y and everything between have `dtype` and are dense NHWC; no output is empty.
struct BlockArgs {
  DType dtype;
  const BlockConv* convs;  // the main path in order, then the shortcut's if there is one
  int64_t main;            // convolutions on the main path, at least 1
  bool has_shortcut;
  const void* x;
  void* y;
};

void run_block(const BlockArgs& block);

// How many images go through the block together.
int64_t images_at_once(const BlockArgs& block);

// The bytes of activations that go through a block together, for the whole process; 0: as measured.
void set_block_budget(int64_t bytes);

}  // namespace resnet_fused
