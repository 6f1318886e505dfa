// How operands lie in shared memory, and which thread holds which accumulator.
//
// An operand of wgmma is a stack of rows (pixels or output channels), each `span` bytes of the
// reduction: 128, 64 or 32, the three swizzle modes of TMA. TMA exchanges the 16-byte chunks of a
// row so that eight rows under each other fall on different banks; wgmma undoes it, from the same
// address bits. Both sides must agree, hence this one file. The functions are plain arithmetic:
// the kernel, the host and the emulation of the hardware's own side share none of them by accident,
// csrc/cuda/emulate has its own from the documents.
#pragma once

#include <cstdint>

#include "cuda/host_device.h"

namespace resnet_fused::sm90 {

// The wgmma matrix descriptor of a K-major operand that starts at `address` (shared window, bytes):
// rows of `span` bytes, groups of eight rows 8 * span bytes apart. The next 16 elements of the
// reduction are 32 bytes further, which is +2 in the descriptor's unit of 16 bytes.
RF_HD uint64_t operand_descriptor(uint32_t address, int span) {
  const uint64_t layout = span == 128 ? 1 : span == 64 ? 2 : 3;
  uint64_t d = (address & 0x3FFFF) >> 4;
  d |= uint64_t(1) << 16;  // leading offset: unused for swizzled K-major operands
  d |= uint64_t((8 * span) >> 4) << 32;
  d |= layout << 62;
  return d;
}

// Of an operand without swizzle: rows of 16 bytes, eight of them 128 bytes; `leading` bytes from
// those to the same rows' next 8 elements, `stride` to the next eight rows. Any multiples of 16:
// rows may overlap.
RF_HD uint64_t plain_descriptor(uint32_t address, int leading, int stride) {
  return (address & 0x3FFFF) >> 4 | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32;
}

// Accumulator register r (0 .. n/2 - 1) of thread t (0 .. 127) of a warpgroup in m64nNk16.
RF_HD int fragment_row(int t, int r) {
  return (t >> 5) * 16 + ((t & 31) >> 2) + 8 * ((r >> 1) & 1);
}
RF_HD int fragment_column(int t, int r) { return (r >> 2) * 8 + (t & 3) * 2 + (r & 1); }

// epilogue.cuh writes 16 bytes a thread: eight channels of one pixel. After quad_transpose lane q
// of a quad holds in word i what lane i held in word q.
struct Vector {
  int pixel, channel;
};
// Pixels on M: the words are column groups 4 * j .. 4 * j + 3 of one half of the rows.
RF_HD Vector vector_pixels_on_m(int t, int half, int j) {
  return {(t >> 5) * 16 + ((t & 31) >> 2) + 8 * half, (4 * j + (t & 3)) * 8};
}

}  // namespace resnet_fused::sm90
