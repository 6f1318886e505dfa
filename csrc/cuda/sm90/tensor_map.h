// What TMA is told about a tensor. The fields, computed here, are the whole of it; on CUDA the
// driver encodes them into 128 opaque bytes, under emulation they are kept as they are.
#pragma once

#include <cstdint>

#include "cuda/sm90/schedule.h"

#ifndef RESNET_FUSED_EMULATE
#include <cuda.h>
#endif

namespace resnet_fused::sm90 {

// Dimensions innermost first. Four of them, (C, W, H, N), for inputs; three, (C, taps, K), for the
// weights, which need the taps apart: flat in (taps, C), the last chunk of a tap would read the
// next tap's channels, and zero times what is there is no zero where it is infinite.
struct MapFields {
  const void* base;
  bool im2col, bfloat16;
  int rank;
  uint64_t size[4];
  uint64_t stride_bytes[3];  // of all but the innermost
  // im2col: corners of the box in which the base pixel moves, W then H, relative to the first and
  // the last pixel. cuda.h writes the array as "{D, H, W}" all the same.
  int lower[2], upper[2];
  uint32_t box[4];     // tiled: elements that the copy spans; im2col: its channels and pixels
  uint32_t stride[4];  // of the walk, in elements: 1, and the convolution's
  int swizzle_bytes;   // 128, 64 or 32: also the bytes of a row in shared memory
};

RF_HD MapFields im2col_fields(const void* base, bool bfloat16, int n, int h, int w, int c, int r,
                              int s, int stride_h, int stride_w, int pad_h, int pad_w,
                              int dilation_h, int dilation_w, int chunk, int pixels) {
  MapFields f = {};
  f.base = base;
  f.im2col = true;
  f.bfloat16 = bfloat16;
  f.rank = 4;
  f.size[0] = c;
  f.size[1] = w;
  f.size[2] = h;
  f.size[3] = n;
  f.stride_bytes[0] = 2ull * c;
  f.stride_bytes[1] = 2ull * c * w;
  f.stride_bytes[2] = 2ull * c * w * h;
  f.lower[0] = -pad_w;
  f.lower[1] = -pad_h;
  f.upper[0] = pad_w - dilation_w * (s - 1);
  f.upper[1] = pad_h - dilation_h * (r - 1);
  f.box[0] = chunk;
  f.box[1] = pixels;
  f.stride[0] = f.stride[3] = 1;
  f.stride[1] = stride_w;
  f.stride[2] = stride_h;
  f.swizzle_bytes = 2 * chunk;
  return f;
}
RF_HD MapFields input_fields(const void* x, bool bfloat16, const Problem& p, const Tile& t) {
  return im2col_fields(x, bfloat16, p.n, p.h, p.w, p.c, p.r, p.s, p.stride_h, p.stride_w, p.pad_h,
                       p.pad_w, p.dilation_h, p.dilation_w, t.chunk, tile_pixels(t));
}
RF_HD MapFields shortcut_fields(const void* x, bool bfloat16, const Problem& p, const Tile& t) {
  return im2col_fields(x, bfloat16, p.n, p.shortcut_h, p.shortcut_w, p.shortcut_c, 1, 1,
                       p.shortcut_stride_h, p.shortcut_stride_w, 0, 0, 1, 1, t.chunk,
                       tile_pixels(t));
}
RF_HD MapFields weight_fields(const void* weight, bool bfloat16, int k, int taps, int c,
                              const Tile& t) {
  MapFields f = {};
  f.base = weight;
  f.bfloat16 = bfloat16;
  f.rank = 3;
  f.size[0] = c;
  f.size[1] = taps;
  f.size[2] = k;
  f.stride_bytes[0] = 2ull * c;
  f.stride_bytes[1] = 2ull * c * taps;
  f.box[0] = t.chunk;
  f.box[1] = 1;
  f.box[2] = tile_channels(t);
  f.stride[0] = f.stride[1] = f.stride[2] = 1;
  f.swizzle_bytes = 2 * t.chunk;
  return f;
}

// The output, or the residual: boxes of 64 channels. Pixels are one dimension, q of them, or three.
RF_HD MapFields output_fields(const void* y, bool bfloat16, int n, int p, int q, int k, int box_n,
                              int box_p, int box_q) {
  MapFields f = {};
  f.base = y;
  f.bfloat16 = bfloat16;
  f.rank = 4;
  f.size[0] = k;
  f.size[1] = q;
  f.size[2] = p;
  f.size[3] = n;
  f.stride_bytes[0] = 2ull * k;
  f.stride_bytes[1] = 2ull * k * q;
  f.stride_bytes[2] = 2ull * k * q * p;
  f.box[0] = 64;
  f.box[1] = box_q;
  f.box[2] = box_p;
  f.box[3] = box_n;
  f.stride[0] = f.stride[1] = f.stride[2] = f.stride[3] = 1;
  f.swizzle_bytes = 128;
  return f;
}

#ifdef RESNET_FUSED_EMULATE
using TensorMap = MapFields;
#else
using TensorMap = CUtensorMap;
#endif
// Null, or the sentence that says why TMA cannot serve these fields.
const char* encode(const MapFields& fields, TensorMap* map);

}  // namespace resnet_fused::sm90
