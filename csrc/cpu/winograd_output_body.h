// Fused Winograd's output transform: from the sums of the points through the epilogue to the
// output.
#include "cpu/winograd.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// Where the output of a tile lies: its first pixel, and how many rows and columns of it exist.
template <class F>
struct TileOutput {
  int64_t pixel, rows, cols;

  TileOutput(const ConvShape& s, const TileCursor& tile) {
    const int64_t top = tile.row * F::kOut, left = tile.col * F::kOut;
    pixel = (tile.image * s.out_h() + top) * s.out_w() + left;
    rows = min_of(F::kOut, s.out_h() - top);
    cols = min_of(F::kOut, s.out_w() - left);
  }
};

// Fetches what the output transform of a panel will read and write into L2, tile by tile, while the
// products are made: one or two lines of every pixel, each missed on its own. On Zen 4 that halves
// the time of the output transform and makes ResNet-18 1.03 times as fast in float32 at batch 1,
// 1.04 at 8 (with AVX2, together with the windows of the input transform, 1.03 and 1.05).
template <class F, typename T>
class OutputAhead {
 public:
  OutputAhead(const ConvArgs& args, const WinogradJob& job, int64_t panel)
      : args_(args),
        tile_(args.shape, F::kOut, job.tile_begin),
        left_(job.tile_end - job.tile_begin),
        channel_(panel * kPanel),
        channels_(min_of(args.shape.out_channels - channel_, kPanel)) {}

  void fetch(int64_t tiles) {
    const ConvShape& s = args_.shape;
    for (; tiles > 0 && left_ > 0; --tiles, --left_, tile_.next()) {
      const TileOutput<F> tile(s, tile_);
      for (int64_t i = 0; i < tile.rows; ++i) {
        for (int64_t j = 0; j < tile.cols; ++j) {
          const int64_t at = (tile.pixel + i * s.out_w() + j) * s.out_channels + channel_;
          fetch_pixel(static_cast<const T*>(args_.y) + at);
          if (args_.residual) fetch_pixel(static_cast<const T*>(args_.residual) + at);
        }
      }
    }
  }

 private:
  inline __attribute__((always_inline)) void fetch_pixel(const T* pixel) const {
    constexpr int64_t kStep = kLine * static_cast<int64_t>(sizeof(float) / sizeof(T));
    for (int64_t c = 0; c < channels_; c += kStep) __builtin_prefetch(pixel + c, 0, 2);
  }

  const ConvArgs& args_;
  TileCursor tile_;
  int64_t left_, channel_, channels_;
};

// One vector of channels of one tile: y = act(A^T sums A * scale + shift + residual).
template <class F, class Product, typename T>
struct OutputTile {
  typedef Transform<F> X;
  const float* sums;  // of point 0, `stride` floats before the next point's
  int64_t stride;
  Reg scale, shift, low;
  const T* residual;  // at the tile's first pixel and channel, like y; may be null
  T* y;
  int64_t row_step, pixel_step;
  int64_t rows, cols, lanes;  // that exist of the tile and the vector

  inline __attribute__((always_inline)) void run() const {
    Reg half[F::kOut][X::kPoints];
#pragma GCC unroll 9
    for (int j = 0; j < X::kPoints; ++j) {
      Reg column[X::kPoints], result[F::kOut];
#pragma GCC unroll 9
      for (int i = 0; i < X::kPoints; ++i) {
        column[i] = Vec::load(sums + (i * X::kPoints + j) * stride);
      }
      X::output(column, result);
#pragma GCC unroll 5
      for (int i = 0; i < F::kOut; ++i) half[i][j] = result[i];
    }
    const bool whole = rows == F::kOut && cols == F::kOut && lanes == Vec::kWidth;
#pragma GCC unroll 5
    for (int i = 0; i < F::kOut; ++i) {
      Reg result[F::kOut];
      X::output(half[i], result);
#pragma GCC unroll 5
      for (int j = 0; j < F::kOut; ++j) result[j] = Vec::fma(result[j], scale, shift);
      if (whole) {
#pragma GCC unroll 5
        for (int j = 0; j < F::kOut; ++j) {
          const int64_t at = i * row_step + j * pixel_step;
          if (residual) result[j] = Vec::add(result[j], Vec::load(residual + at));
          Product::store(y + at, Vec::at_least(result[j], low));
        }
      } else if (i < rows) {
        store_part(result, i * row_step);
      }
    }
  }

 private:
  void store_part(const Reg (&result)[F::kOut], int64_t at) const {
#pragma GCC unroll 1
    for (int64_t j = 0; j < cols; ++j, at += pixel_step) {
      Reg value = result[j];
      if (residual) value = Vec::add(value, Vec::load(residual + at, lanes));
      Product::store(y + at, Vec::at_least(value, low), lanes);
    }
  }
};

// The channels of one panel, all tiles of the job.
template <class F, class Product, typename T>
static void transform_outputs(const ConvArgs& args, const WinogradJob& job, int64_t panel,
                              const float* sums) {
  const ConvShape& s = args.shape;
  const int64_t count = job.tile_end - job.tile_begin;
  const int64_t end = min_of(s.out_channels - panel * kPanel, kPanel);
  OutputTile<F, Product, T> out;
  out.stride = sums_stride(count);
  out.low = Vec::set1(args.relu ? 0.0f : -__builtin_inff());
  out.pixel_step = s.out_channels;
  out.row_step = s.out_w() * s.out_channels;
  TileCursor tile(s, F::kOut, job.tile_begin);
  for (int64_t t = 0; t < count; ++t, tile.next()) {
    const TileOutput<F> place(s, tile);
    const int64_t at = place.pixel * s.out_channels;
    out.rows = place.rows;
    out.cols = place.cols;
    // All vectors of a tile together, because in 16-bit types two of them share a cache line.
    for (int64_t col = 0; col < end; col += Vec::kWidth) {
      const int64_t channel = panel * kPanel + col;
      out.lanes = min_of(end - col, Vec::kWidth);
      out.scale = Vec::load(args.scale + channel, out.lanes);
      out.shift = Vec::load(args.shift + channel, out.lanes);
      out.sums = sums + t * kPanel + col;
      out.residual = args.residual ? static_cast<const T*>(args.residual) + at + channel : nullptr;
      out.y = static_cast<T*>(args.y) + at + channel;
      out.run();
    }
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
