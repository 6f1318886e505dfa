// Input transform, products and output transform of fused Winograd, written once over `Vec`.
#include "cpu/winograd.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// 1-D transforms of F(4, 3): d has 6 values, m 6 values, y 4.
struct F4 {
  static constexpr int kOut = 4, kIn = 6;

  static inline __attribute__((always_inline)) void input(const Reg (&d)[6], Reg (&t)[6]) {
    const Reg a2 = Vec::set1(-kA2), b2 = Vec::set1(-kB2);
    const Reg sum = Vec::set1(-(kA2 + kB2)), product = Vec::set1(kA2 * kB2);
    const Reg a = Vec::set1(kPointA), b = Vec::set1(kPointB);
    const Reg even_b = Vec::fma(b2, d[2], d[4]), odd_b = Vec::fma(b2, d[1], d[3]);
    const Reg even_a = Vec::fma(a2, d[2], d[4]), odd_a = Vec::fma(a2, d[1], d[3]);
    t[0] = Vec::fma(product, d[0], Vec::fma(sum, d[2], d[4]));
    t[1] = Vec::fma(a, odd_b, even_b);
    t[2] = Vec::fnma(a, odd_b, even_b);
    t[3] = Vec::fma(b, odd_a, even_a);
    t[4] = Vec::fnma(b, odd_a, even_a);
    t[5] = Vec::fma(product, d[1], Vec::fma(sum, d[3], d[5]));
  }

  static inline __attribute__((always_inline)) void output(const Reg (&m)[6], Reg (&y)[4]) {
    const Reg sum_a = Vec::add(m[1], m[2]), difference_a = Vec::sub(m[1], m[2]);
    const Reg sum_b = Vec::add(m[3], m[4]), difference_b = Vec::sub(m[3], m[4]);
    y[0] = Vec::add(Vec::add(m[0], sum_a), sum_b);
    y[1] = Vec::fma(Vec::set1(kPointB), difference_b, Vec::mul(Vec::set1(kPointA), difference_a));
    y[2] = Vec::fma(Vec::set1(kB2), sum_b, Vec::mul(Vec::set1(kA2), sum_a));
    y[3] = Vec::fma(Vec::set1(kB2 * kPointB), difference_b,
                    Vec::fma(Vec::set1(kA2 * kPointA), difference_a, m[5]));
  }
};

// 1-D transforms of F(2, 3): d has 4 values, m 4 values, y 2.
struct F2 {
  static constexpr int kOut = 2, kIn = 4;

  static inline __attribute__((always_inline)) void input(const Reg (&d)[4], Reg (&t)[4]) {
    t[0] = Vec::sub(d[0], d[2]);
    t[1] = Vec::add(d[1], d[2]);
    t[2] = Vec::sub(d[2], d[1]);
    t[3] = Vec::sub(d[3], d[1]);
  }

  static inline __attribute__((always_inline)) void output(const Reg (&m)[4], Reg (&y)[2]) {
    y[0] = Vec::add(Vec::add(m[0], m[1]), m[2]);
    y[1] = Vec::add(Vec::sub(m[1], m[2]), m[3]);
  }
};

// The tiles of a job in order: image, and the first output pixel of the tile.
struct TileCursor {
  int64_t tile_rows, tile_cols;
  int64_t image, row, col;

  TileCursor(const ConvShape& shape, int64_t m, int64_t tile)
      : tile_rows(ceil_div(shape.out_h(), m)), tile_cols(ceil_div(shape.out_w(), m)) {
    col = tile % tile_cols;
    row = tile / tile_cols % tile_rows;
    image = tile / tile_cols / tile_rows;
  }
  void next() {
    if (++col < tile_cols) return;
    col = 0;
    if (++row < tile_rows) return;
    row = 0;
    ++image;
  }
};

// One window, `lanes` channels: source(i, j) points to its first channel, or is null outside the
// image.
template <class F, typename T, bool kInside>
static inline __attribute__((always_inline)) void transform_window(
    const T* const (&source)[F::kIn][F::kIn], int64_t offset, int64_t lanes, float* values,
    int64_t stride) {
  constexpr int kIn = F::kIn;
  Reg half[kIn][kIn];
#pragma GCC unroll 6
  for (int j = 0; j < kIn; ++j) {
    Reg column[kIn], result[kIn];
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) {
      if (kInside) {
        column[i] = Vec::load(source[i][j] + offset);
      } else {
        column[i] = source[i][j] ? Vec::load(source[i][j] + offset, lanes) : Vec::zero();
      }
    }
    F::input(column, result);
#pragma GCC unroll 6
    for (int i = 0; i < kIn; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kIn; ++i) {
    Reg result[kIn];
    F::input(half[i], result);
#pragma GCC unroll 6
    for (int j = 0; j < kIn; ++j) Vec::store(values + (i * kIn + j) * stride, result[j]);
  }
}

template <class F, typename T>
static void transform_inputs(const ConvArgs& args, const WinogradJob& job, float* values) {
  constexpr int kIn = F::kIn;
  const ConvShape& s = args.shape;
  const int64_t count = job.tile_end - job.tile_begin;
  const int64_t stride = values_stride(s, count);
  TileCursor tile(s, F::kOut, job.tile_begin);
  for (int64_t t = 0; t < count; ++t, tile.next()) {
    const int64_t top = tile.row * F::kOut - s.pad_h, left = tile.col * F::kOut - s.pad_w;
    const T* image = static_cast<const T*>(args.x) + tile.image * s.in_h * s.in_w * s.in_channels;
    const T* source[kIn][kIn];
    bool inside = true;
    for (int i = 0; i < kIn; ++i) {
      for (int j = 0; j < kIn; ++j) {
        const int64_t y = top + i, x = left + j;
        const bool valid = y >= 0 && y < s.in_h && x >= 0 && x < s.in_w;
        source[i][j] = valid ? image + (y * s.in_w + x) * s.in_channels : nullptr;
        inside &= valid;
      }
    }
    for (int64_t c = 0; c < s.in_channels; c += Vec::kWidth) {
      const int64_t lanes = min_of(s.in_channels - c, Vec::kWidth);
      float* target = values + (c / kChunk * count + t) * kChunk + c % kChunk;
      if (inside && lanes == Vec::kWidth) {
        transform_window<F, T, true>(source, c, lanes, target, stride);
      } else {
        transform_window<F, T, false>(source, c, lanes, target, stride);
      }
    }
  }
}

// sums[point] = values[point] x packed[panel][point] for every point.
template <class F>
static void multiply_points(const ConvArgs& args, int64_t count, int64_t panel, const float* values,
                            float* sums) {
  constexpr int64_t kPoints = F::kIn * F::kIn;
  const ConvShape& s = args.shape;
  const int64_t groups = ceil_div(count, Vec::kRows);
  Tile<float> tile = {};
  tile.chunk_step = count * kChunk;
  tile.segments = 1;
  tile.length = s.in_channels;
  tile.first = true;
  tile.last = false;
  tile.columns = kPanel;
  for (int64_t point = 0; point < kPoints; ++point) {
    tile.panel = args.packed + (panel * kPoints + point) * s.in_channels * kPanel;
    for (int64_t g = 0, r = 0; g < groups; ++g) {
      const int64_t size = min_of(Vec::kRows, count - r);
      tile.rows = values + point * values_stride(s, count) + r * kChunk;
      tile.partial = sums + point * sums_stride(count) + r * kPanel;
      TileTable<float, Vec::kRows>::run(size, tile);
      r += size;
    }
  }
}

// y = act(A^T sums A * scale + shift + residual) for the channels of one panel.
template <class F, typename T>
static void transform_outputs(const ConvArgs& args, const WinogradJob& job, int64_t panel,
                              const float* sums) {
  constexpr int kIn = F::kIn, kOut = F::kOut;
  const ConvShape& s = args.shape;
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  const int64_t count = job.tile_end - job.tile_begin;
  const int64_t stride = sums_stride(count);
  const int64_t first_channel = panel * kPanel;
  const Reg low = Vec::set1(args.relu ? 0.0f : -__builtin_inff());
  TileCursor tile(s, kOut, job.tile_begin);
  for (int64_t t = 0; t < count; ++t, tile.next()) {
    const int64_t top = tile.row * kOut, left = tile.col * kOut;
    const int64_t rows = min_of(kOut, out_h - top), cols = min_of(kOut, out_w - left);
    const int64_t first_pixel = (tile.image * out_h + top) * out_w + left;
    for (int64_t col = 0; col < kPanel && first_channel + col < s.out_channels;
         col += Vec::kWidth) {
      const int64_t c = first_channel + col;
      const int64_t lanes = min_of(s.out_channels - c, Vec::kWidth);
      const float* source = sums + t * kPanel + col;
      Reg half[kOut][kIn];
#pragma GCC unroll 6
      for (int j = 0; j < kIn; ++j) {
        Reg column[kIn], result[kOut];
#pragma GCC unroll 6
        for (int i = 0; i < kIn; ++i) column[i] = Vec::load(source + (i * kIn + j) * stride);
        F::output(column, result);
#pragma GCC unroll 6
        for (int i = 0; i < kOut; ++i) half[i][j] = result[i];
      }
      const Reg scale = Vec::load(args.scale + c, lanes), shift = Vec::load(args.shift + c, lanes);
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i) {
        Reg result[kOut];
        F::output(half[i], result);
        if (i >= rows) break;
#pragma GCC unroll 4
        for (int j = 0; j < kOut; ++j) {
          if (j >= cols) break;
          const int64_t at = (first_pixel + i * out_w + j) * s.out_channels + c;
          Reg value = Vec::fma(result[j], scale, shift);
          if (args.residual) {
            value = Vec::add(value, Vec::load(static_cast<const T*>(args.residual) + at, lanes));
          }
          Vec::store(static_cast<T*>(args.y) + at, Vec::at_least(value, low), lanes);
        }
      }
    }
  }
}

template <class F, typename T>
static void run_winograd(const ConvArgs& args, const WinogradJob& job, float* scratch) {
  const int64_t count = job.tile_end - job.tile_begin;
  float* sums = scratch + winograd_points(F::kOut) * values_stride(args.shape, count);
  if (!job.values_ready) transform_inputs<F, T>(args, job, scratch);
  for (int64_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
    multiply_points<F>(args, count, panel, scratch, sums);
    transform_outputs<F, T>(args, job, panel, sums);
  }
}

template <class F>
static void run_winograd_dtype(const ConvArgs& args, const WinogradJob& job, float* scratch) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_winograd<F, float>(args, job, scratch);
    case DType::kBFloat16:
      return run_winograd<F, BFloat16>(args, job, scratch);
    case DType::kFloat16:
      return run_winograd<F, Float16>(args, job, scratch);
    case DType::kFloat64:
      return;  // never planned: double runs on PyTorch's convolution
  }
}

static void winograd_job(const ConvArgs& args, int64_t m, const WinogradJob& job, float* scratch) {
  if (m == 4) {
    run_winograd_dtype<F4>(args, job, scratch);
  } else {
    run_winograd_dtype<F2>(args, job, scratch);
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
