// y = act(x * scale + shift + residual), channel by channel: what follows a convolution that our
// kernels do not compute.
#pragma once

#include "cuda/sm80/pointwise.h"

struct CUstream_st;

namespace resnet_fused::sm80 {

struct ScaleShift {
  const void *x, *residual;    // [pixels][channels]; residual may be null
  const float *scale, *shift;  // [channels]
  void* y;
  int64_t count;  // elements of x
  int channels;
  bool relu;
  bool aligned;  // all pointers are, to 16 bytes, and rows are whole vectors of 16 bytes
};

// Whether rows of `channels` elements are whole vectors, and the pointers are aligned.
bool in_vectors(const ScaleShift& p, Type type);

// On the current device. Empty, or why the kernel did not start. Safe in CUDA graph capture.
std::string launch_scale_shift(Type type, ScaleShift p, const Device& device, CUstream_st* stream);

const void* scale_shift_bfloat16();
const void* scale_shift_float16();
const void* scale_shift_float32();

}  // namespace resnet_fused::sm80
