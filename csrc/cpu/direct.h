// Implicit-GEMM convolution: how the work is cut, shared by the driver and the kernels.
//
// The convolution is a matrix product: rows are output pixels, columns are output channels, and the
// reduction runs over (kernel row, kernel column, input channel). Weights are packed once as
//
//   packed[group][panel][segment][word][32]   panel = 32 output channels, the last one padded with
//   0
//
// and each job gathers its input rows into the cache in the order in which the kernel reads them:
//
//   rows[segment][chunk][row][16]             chunk = 16 words
//
// so that a register tile walks both with constant offsets. A word is one float of the reduction or
// a pair of bfloat16. A segment is what lies together in the input: the channels of one tap, or
// with few channels (the RGB stem) a whole row of taps; its last chunk may be cut short. Pairs
// never reach over a tap, since weights are packed before the dilation is known. Neither layout
// depends on the instruction set: packed weights stay valid whichever kernel runs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv.h"
#include "cpu/cut.h"

namespace resnet_fused {

constexpr int64_t kPanel = 32;
constexpr int64_t kChunk = 16;
constexpr int64_t kMaxRows = 112;   // of a job
constexpr int64_t kMaxSlice = 512;  // words gathered at once, if a segment is not longer

inline int64_t panels_of(int64_t group_out) { return ceil_div(group_out, kPanel); }

// The reduction as `count` segments of `length` elements, `pack` of which share a 32-bit word.
struct Segments {
  int64_t count;
  int64_t length;
  int64_t pack;
  bool kernel_rows;  // a segment is a row of taps, not one tap

  Segments(const ConvShape& s, int64_t pack)
      : pack(pack),
        kernel_rows(pack == 1 && s.groups == 1 && s.dilation_w == 1 &&
                    s.in_channels % kChunk != 0) {
    count = kernel_rows ? s.kernel_h : s.kernel_h * s.kernel_w;
    length = s.reduction() / count;
  }
  int64_t words() const { return ceil_div(length, pack); }
  int64_t chunks() const { return ceil_div(words(), kChunk); }

  // Whether the segment sees anything but padding: of a 1 x 1 map only the middle tap does.
  bool live(const ConvShape& s, int64_t index) const {
    const int64_t ky = kernel_rows ? index : index / s.kernel_w;
    const bool row = sees_input(s.out_h(), s.stride_h, ky * s.dilation_h - s.pad_h, s.in_h);
    if (kernel_rows) return row;
    const int64_t kx = index % s.kernel_w;
    return row && sees_input(s.out_w(), s.stride_w, kx * s.dilation_w - s.pad_w, s.in_w);
  }

 private:
  // Whether offset + stride * i lies in [0, size) for any i in [0, outputs).
  static bool sees_input(int64_t outputs, int64_t stride, int64_t offset, int64_t size) {
    const int64_t first = offset < 0 ? ceil_div(-offset, stride) : 0;
    return first < outputs && offset + stride * first < size;
  }
};

// One job: output pixels [row_begin, row_end), panels [panel_begin, panel_end) of `group`.
struct DirectJob {
  int64_t row_begin, row_end;
  int64_t group;
  int64_t panel_begin, panel_end;
  int64_t slice;
  bool rows_ready;  // the scratch memory holds what the last job gathered, of the same rows
};

// How a convolution with at least one output pixel is cut into jobs for `threads` threads; `pack`:
// elements of the reduction in a word.
Cut direct_cut(const ConvShape& shape, int64_t pack, int64_t threads);
// weight: [out_channels][group_in][kernel_h][kernel_w], dense; packed: the layout of a direct plan.
void direct_pack(Plan plan, const ConvShape& shape, const float* weight, void* packed);

}  // namespace resnet_fused
