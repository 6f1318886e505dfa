// Fused Winograd's input transform: the windows of a job's tiles, from the image into the matrices
// of the points.
#include "cpu/winograd.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// B^T x B for one vector of channels of a window whose first pixel is at `corner`, distances in
// elements; put(point, value) takes the results.
template <class F, typename T, class Put>
static inline __attribute__((always_inline)) void transform_window(const T* corner,
                                                                   int64_t row_step,
                                                                   int64_t pixel_step,
                                                                   const Put& put) {
  typedef Transform<F> X;
  constexpr int kWindow = X::kWindow, kPoints = X::kPoints;
  Reg half[kPoints][kWindow];
#pragma GCC unroll 9
  for (int j = 0; j < kWindow; ++j) {
    Reg column[kWindow], result[kPoints];
#pragma GCC unroll 9
    for (int i = 0; i < kWindow; ++i) {
      column[i] = Vec::load(corner + i * row_step + j * pixel_step);
    }
    X::input(column, result);
#pragma GCC unroll 9
    for (int i = 0; i < kPoints; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 9
  for (int i = 0; i < kPoints; ++i) {
    Reg result[kPoints];
    X::input(half[i], result);
#pragma GCC unroll 9
    for (int j = 0; j < kPoints; ++j) put(i * kPoints + j, result[j]);
  }
}

// Puts each point's value into its matrix.
struct PutFloats {
  float* values;
  int64_t stride;
  inline __attribute__((always_inline)) void operator()(int point, Reg value) const {
    Vec::store(values + point * stride, value);
  }
};

#ifdef RESNET_FUSED_BF16_PRODUCTS
// Keeps the values of the first 16 channels, then puts both halves as pairs of bfloat16.
struct Keep {
  Reg* kept;
  inline __attribute__((always_inline)) void operator()(int point, Reg value) const {
    kept[point] = value;
  }
};
struct PutPairs {
  const Reg* kept;
  float* values;
  int64_t stride;
  inline __attribute__((always_inline)) void operator()(int point, Reg value) const {
    Vec::store(values + point * stride, Vec::pair_bf16(kept[point], value));
  }
};
#endif

// As many channels as fill one vector of words, from the window at `corner` into `values`.
template <class F, class Product, typename T>
static __attribute__((noinline)) void transform_words(const T* corner, int64_t row_step,
                                                      int64_t pixel_step, float* values,
                                                      int64_t stride) {
  if constexpr (Product::kPack == 1) {
    transform_window<F>(corner, row_step, pixel_step, PutFloats{values, stride});
  }
#ifdef RESNET_FUSED_BF16_PRODUCTS
  if constexpr (Product::kPack == 2) {
    Reg kept[WinogradSizes<F>::kPoints * WinogradSizes<F>::kPoints];
    transform_window<F>(corner, row_step, pixel_step, Keep{kept});
    transform_window<F>(corner + Vec::kWidth, row_step, pixel_step, PutPairs{kept, values, stride});
  }
#endif
}

// The first `channels` of a pixel as floats, zeros behind them.
template <int kChannels, typename T>
static inline __attribute__((always_inline)) void copy_pixel(const T* pixel, int64_t channels,
                                                             float (&copy)[kChannels]) {
#pragma GCC unroll 8
  for (int k = 0; k < kChannels; k += Vec::kWidth) {
    if (channels == kChannels) {
      Vec::store(copy + k, Vec::load(pixel + k));
    } else {
      const int64_t lanes = min_of(channels - k, Vec::kWidth);
      Vec::store(copy + k, lanes > 0 ? Vec::load(pixel + k, lanes) : Vec::zero());
    }
  }
}

template <int kWindow, int kChannels>
static inline void zero_pixels(float (&copy)[kWindow][kWindow][kChannels]) {
  for (int i = 0; i < kWindow; ++i) {
    for (int j = 0; j < kWindow; ++j) {
#pragma GCC unroll 8
      for (int k = 0; k < kChannels; k += Vec::kWidth) Vec::store(copy[i][j] + k, Vec::zero());
    }
  }
}

// Where the window of a tile lies in its image: its first pixel, which may be outside, and which of
// its rows and columns are inside.
template <class F>
struct TileWindow {
  static constexpr int64_t kSize = WinogradSizes<F>::kWindow, kStep = F::kOut * F::kStride;
  int64_t top, left;
  int64_t rows_from, rows_to, cols_from, cols_to;

  TileWindow(const ConvShape& s, const TileCursor& tile)
      : top(tile.row * kStep - s.pad_h),
        left(tile.col * kStep - s.pad_w),
        rows_from(max_of(-top, 0)),
        rows_to(min_of(s.in_h - top, kSize)),
        cols_from(max_of(-left, 0)),
        cols_to(min_of(s.in_w - left, kSize)) {}

  bool whole() const {
    return rows_from == 0 && cols_from == 0 && rows_to == kSize && cols_to == kSize;
  }
};

// The windows of a job's tiles, transformed. One that reaches over the edge of the image, or has
// channels for part of a vector only, goes through a copy that is zero outside; it is floats, so
// that all dtypes share one transform for it (with one of each kind per dtype the library took
// 140 s to compile). Meanwhile the next tile's window is fetched, without the columns that both
// have: 1% of ResNet-18 at batch 1 and 8 (Zen 4).
template <class F, class Product, typename T>
static void transform_inputs(const ConvArgs& args, const WinogradJob& job, float* values) {
  constexpr int kWindow = WinogradSizes<F>::kWindow;
  constexpr int kChannels = Vec::kWidth * Product::kPack;  // of one transform_words
  constexpr int64_t kLineElements = kLine * static_cast<int64_t>(sizeof(float) / sizeof(T));
  const ConvShape& s = args.shape;
  const int64_t count = job.tile_end - job.tile_begin;
  const int64_t stride = values_stride(s, Product::kPack, count);
  const int64_t row_step = s.in_w * s.in_channels;
  const auto first_pixel = [&](const TileCursor& tile, const TileWindow<F>& window) {
    return static_cast<const T*>(args.x) + (tile.image * s.in_h + window.top) * row_step +
           window.left * s.in_channels;
  };
  alignas(64) float copy[kWindow][kWindow][kChannels];
  TileCursor tile(s, F::kOut, job.tile_begin);
  for (int64_t t = 0; t < count; ++t) {
    const TileWindow<F> window(s, tile);
    const T* corner = first_pixel(tile, window);
    tile.next();
    const TileWindow<F> next(s, tile);
    const T* next_corner = first_pixel(tile, next);
    const int64_t next_rows = tile.image < s.batch ? next.rows_to : 0;
    const int64_t shared = tile.col > 0 ? kWindow - TileWindow<F>::kStep : 0;
    const bool whole = window.whole();
    if (!whole) zero_pixels(copy);
    for (int64_t c = 0; c < s.in_channels; c += kChannels) {
      if (c % kLineElements == 0) {
        for (int64_t i = next.rows_from; i < next_rows; ++i) {
          for (int64_t j = max_of(next.cols_from, shared); j < next.cols_to; ++j) {
            __builtin_prefetch(next_corner + i * row_step + j * s.in_channels + c);
          }
        }
      }
      const int64_t word = c / Product::kPack;
      float* target = values + (word / kChunk * count + t) * kChunk + word % kChunk;
      const int64_t channels = min_of(s.in_channels - c, kChannels);
      if (whole && channels == kChannels) {
        transform_words<F, Product>(corner + c, row_step, s.in_channels, target, stride);
        continue;
      }
      for (int64_t i = window.rows_from; i < window.rows_to; ++i) {
        for (int64_t j = window.cols_from; j < window.cols_to; ++j) {
          copy_pixel(corner + i * row_step + j * s.in_channels + c, channels, copy[i][j]);
        }
      }
      transform_words<F, Product>(copy[0][0], kWindow * kChannels, int64_t{kChannels}, target,
                                  stride);
    }
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
