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

constexpr int kIntoL1 = 3, kIntoL2 = 2;  // of __builtin_prefetch

// Fetches what the windows of consecutive tiles have and those to their left do not: of one window
// after the other all pixels, by a cache line of channels.
template <class F, typename T, int kLocality>
class WindowsAhead {
 public:
  // `tiles` of them, from `tile` on.
  WindowsAhead(const ConvArgs& args, const TileCursor& tile, int64_t tiles)
      : args_(args), tile_(tile), left_(tiles * ceil_div(args.shape.in_channels, kLineElements)) {
    if (left_ > 0) begin_tile();
  }

  int64_t left() const { return left_; }  // lines

  void fetch(int64_t lines) {
    const ConvShape& s = args_.shape;
    const int64_t row_step = s.in_w * s.in_channels;
    for (; lines > 0 && left_ > 0; --lines, --left_) {
      const T* line = corner_ + channel_;
      for (int64_t i = 0; i < rows_; ++i, line += row_step) {
        for (int64_t j = 0; j < cols_; ++j) {
          __builtin_prefetch(line + j * s.in_channels, 0, kLocality);
        }
      }
      channel_ += kLineElements;
      if (channel_ < s.in_channels || left_ == 1) continue;
      tile_.next();
      begin_tile();
    }
  }

 private:
  static constexpr int64_t kLineElements = kLine * static_cast<int64_t>(sizeof(float) / sizeof(T));

  void begin_tile() {
    const ConvShape& s = args_.shape;
    const TileWindow<F> window(s, tile_);
    const int64_t shared = tile_.col > 0 ? TileWindow<F>::kSize - TileWindow<F>::kStep : 0;
    const int64_t from = max_of(window.cols_from, shared);
    const int64_t row = tile_.image * s.in_h + window.top + window.rows_from;
    rows_ = window.rows_to - window.rows_from;
    cols_ = window.cols_to - from;
    corner_ = static_cast<const T*>(args_.x) + (row * s.in_w + window.left + from) * s.in_channels;
    channel_ = 0;
  }

  const ConvArgs& args_;
  TileCursor tile_;
  int64_t left_;
  const T* corner_ = nullptr;  // of what is fetched of the tile's window
  int64_t rows_ = 0, cols_ = 0, channel_ = 0;
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
  alignas(64) float copy[kWindow][kWindow][kChannels];
  TileCursor tile(s, F::kOut, job.tile_begin);
  TileCursor second = tile;
  second.next();
  WindowsAhead<F, T, kIntoL1> ahead(args, second, count - 1);
  for (int64_t t = 0; t < count; ++t, tile.next()) {
    const TileWindow<F> window(s, tile);
    const T* corner = static_cast<const T*>(args.x) +
                      (tile.image * s.in_h + window.top) * row_step + window.left * s.in_channels;
    const bool whole = window.whole();
    if (!whole) zero_pixels(copy);
    for (int64_t c = 0; c < s.in_channels; c += kChannels) {
      if (c % kLineElements == 0) ahead.fetch(1);
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
