// Global memory to shared memory: one thread's part of every stage.
//
// A stage is `kStep` elements of the flattened reduction (r, s, c) for each of the block's pixels
// and output channels. A thread copies the same 16-byte chunk of several rows, and walks along the
// reduction with an input offset that it updates, never dividing in the loop.
#pragma once

#include "cuda/sm80/shortcut.cuh"

namespace resnet_fused::sm80 {

template <typename T, typename C, bool kShortcut>
struct Loader {
  static constexpr int kFar = -(1 << 28);  // a coordinate whose taps are all outside

  const KernelParams& p;
  uint8_t* const shared;
  const uint32_t shared_0;
  const int chunk, row;     // of this thread; its next rows are C::kRows further
  const int pixel, pixels;  // the block's first; the tensor's
  const int group, channel, channel_end;
  uint32_t swizzled;
  // The open range of the reduction: the convolution's, or the shortcut's.
  const T* tap[C::kPixelRows];                   // a pixel's first tap; may lie outside x
  int at_h[C::kPixelRows], at_w[C::kPixelRows];  // its input coordinates
  const T* weight;                               // of this thread's first channel and chunk
  uint32_t live;                                 // bit i: row i of the channels has weights
  int length, c_count, height, width, pitch;
  int k, c, s, dh, dw, offset;  // this thread's place in it, and where the tap is from `tap`
  // The shortcut has one tap, and whatever follows it is past its length: the convolution's taps
  // can be walked there too.
  RF_DEVICE int s_count() const { return p.problem.s; }
  RF_DEVICE int step_h() const { return p.problem.dilation_h; }
  RF_DEVICE int step_w() const { return p.problem.dilation_w; }

  RF_DEVICE Loader(const KernelParams& params, uint8_t* memory, int tid, int first_pixel,
                   int pixel_count, int group_index, int first_channel, int end)
      : p(params),
        shared(memory),
        shared_0(shared_address(memory)),
        chunk(tid % C::kChunks),
        row(tid / C::kChunks),
        pixel(first_pixel),
        pixels(pixel_count),
        group(group_index),
        channel(first_channel),
        channel_end(end),
        swizzled(C::swizzle(row, chunk)) {}

  // Starts a range at `step` steps behind its beginning.
  RF_DEVICE void open(bool shortcut, int step) {
    const Problem& q = p.problem;
    const T* x = static_cast<const T*>(p.x);
    const T* w = static_cast<const T*>(p.weight);
    int stride_h = q.stride_h, stride_w = q.stride_w, pad_h = q.pad_h, pad_w = q.pad_w;
    c_count = q.c / q.groups;
    length = q.r * q.s * c_count;
    height = q.h, width = q.w, pitch = q.c;
    x += group * c_count;
    if (kShortcut && shortcut) {
      x = static_cast<const T*>(p.shortcut_x);
      w = static_cast<const T*>(p.shortcut_weight);
      stride_h = q.shortcut_stride_h, stride_w = q.shortcut_stride_w, pad_h = pad_w = 0;
      length = c_count = pitch = q.shortcut_c;
      height = q.shortcut_h, width = q.shortcut_w;
    }
#pragma unroll
    for (int i = 0; i < C::kPixelRows; ++i) {
      const int m = pixel + row + i * C::kRows;
      const int line = m / p.out_w, image = line / p.out_h;
      at_h[i] = m < pixels ? (line - image * p.out_h) * stride_h - pad_h : kFar;
      at_w[i] = (m - line * p.out_w) * stride_w - pad_w;
      tap[i] = x + ((int64_t(image) * height + at_h[i]) * width + at_w[i]) * pitch;
    }
    k = step * C::kStep + chunk * C::kElements;
    const int taps = k / c_count, r = taps / s_count();
    c = k - taps * c_count;
    s = taps - r * s_count();
    dh = r * step_h();
    dw = s * step_w();
    offset = (dh * width + dw) * pitch + c;  // an image has fewer than 2^31 elements
    weight = w + int64_t(channel + row) * length + k;
    live = 0;
#pragma unroll
    for (int i = 0; i < C::kChannelRows; ++i) {
      const int n = channel + row + i * C::kRows;
      const bool has = n < channel_end && !(kShortcut && shortcut && joint_scale(p, n).dead);
      live |= uint32_t(has) << i;
    }
  }

  RF_DEVICE bool inside(int i, int down, int right) const {
    return unsigned(at_h[i] + down) < unsigned(height) &&
           unsigned(at_w[i] + right) < unsigned(width);
  }

  // Fills a stage with the range's next step, and goes on.
  RF_DEVICE void load(int stage) {
    const uint32_t to = stage * C::kStageBytes + swizzled;
    if constexpr (C::kVector) {
      copy(to);
    } else {
      store(to);
    }
    k += C::kStep;
    c += C::kStep;
    offset += C::kStep;
    weight += C::kStep;
    while (c >= c_count) {
      c -= c_count;
      dw += step_w();
      offset += step_w() * pitch - c_count;
      if (++s == s_count()) {
        s = dw = 0;
        dh += step_h();
        offset += (step_h() * width - s_count() * step_w()) * pitch;
      }
    }
  }

 private:
  // A chunk lies in one tap, aligned: the channels of a group are whole chunks.
  RF_DEVICE void copy(uint32_t to) {
    const bool has = k < length;
#pragma unroll
    for (int i = 0; i < C::kPixelRows; ++i)
      copy_16(shared_0 + to + i * (C::kRows * C::kRowBytes), tap[i] + offset,
              has && inside(i, dh, dw));
#pragma unroll
    for (int i = 0; i < C::kChannelRows; ++i)
      copy_16(shared_0 + to + C::kPixelBytes + i * (C::kRows * C::kRowBytes),
              weight + int64_t(i * C::kRows) * length, has && (live >> i & 1));
  }
  // Any channels: element by element, through registers. The ring's barriers order these stores
  // too.
  RF_DEVICE void store(uint32_t to) {
#pragma unroll
    for (int i = 0; i < C::kPixelRows; ++i) {
      Vector<T> v;
      int cc = c, ss = s, down = dh, right = dw;
#pragma unroll
      for (int j = 0; j < C::kElements; ++j) {
        const bool in = k + j < length && inside(i, down, right);
        v.v[j] = in ? tap[i][(down * width + right) * pitch + cc] : from_float<T>(0.f);
        if (++cc == c_count) {
          cc = 0;
          right += step_w();
          if (++ss == s_count()) {
            ss = right = 0;
            down += step_h();
          }
        }
      }
      *reinterpret_cast<Vector<T>*>(shared + to + i * (C::kRows * C::kRowBytes)) = v;
    }
#pragma unroll
    for (int i = 0; i < C::kChannelRows; ++i) {
      Vector<T> v;
#pragma unroll
      for (int j = 0; j < C::kElements; ++j)
        v.v[j] = (live >> i & 1) && k + j < length ? weight[int64_t(i * C::kRows) * length + j]
                                                   : from_float<T>(0.f);
      *reinterpret_cast<Vector<T>*>(shared + to + C::kPixelBytes + i * (C::kRows * C::kRowBytes)) =
          v;
    }
  }
};

}  // namespace resnet_fused::sm80
