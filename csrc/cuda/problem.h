// One convolution, as all kernels take it.
//
//   y[n][p][q][k] = act(scale[k] * sum over r, s, c of x[n][h][w][c] * weight[k][r][s][c] + ...)
//   h = p * stride_h - pad_h + r * dilation_h,  w = q * stride_w - pad_w + s * dilation_w
#pragma once

#include "cuda/host_device.h"

namespace resnet_fused::cuda {

// NHWC activations, [K][R][S][C / groups] weights. shortcut_c == 0: none; else a second tensor
// [N][shortcut_h][shortcut_w][shortcut_c] with weights [K][shortcut_c], 1 x 1, without padding.
struct Problem {
  int n, h, w, c, k, r, s, groups;
  int stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int shortcut_c, shortcut_h, shortcut_w, shortcut_stride_h, shortcut_stride_w;
};
RF_HD int out_h(const Problem& p) {
  return (p.h + 2 * p.pad_h - p.dilation_h * (p.r - 1) - 1) / p.stride_h + 1;
}
RF_HD int out_w(const Problem& p) {
  return (p.w + 2 * p.pad_w - p.dilation_w * (p.s - 1) - 1) / p.stride_w + 1;
}
// Rows or columns behind a stem's max-pool, 3 x 3 of stride 2 and padding 1.
template <typename Int>
RF_HD constexpr Int pooled(Int size) {
  return (size - 1) / 2 + 1;
}
RF_HD int pixels(const Problem& p) { return p.n * out_h(p) * out_w(p); }
RF_HD int group_in(const Problem& p) { return p.c / p.groups; }
RF_HD int group_out(const Problem& p) { return p.k / p.groups; }

}  // namespace resnet_fused::cuda
