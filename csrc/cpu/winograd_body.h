// Input transform, products and output transform of fused Winograd, written once over `Vec` and the
// algorithms of winograd_points.h.
#include "cpu/winograd.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// The 1-D transforms of an algorithm, 16, 8 or 4 channels at a time.
template <class F>
struct Transform : WinogradSizes<F> {
  typedef WinogradSizes<F> S;
  static constexpr WinogradTables<F> kTables{};
  static constexpr int kZeros = F::kZero ? 1 : 0;

  // d: a window's row or column.
  static inline __attribute__((always_inline)) void input(const Reg (&d)[S::kWindow],
                                                          Reg (&t)[S::kPoints]) {
    if (F::kZero) t[0] = sum<F::kPairs>(d, kTables.all, 0);
#pragma GCC unroll 3
    for (int i = 0; i < F::kPairs; ++i) {
      const Reg point = Vec::set1(F::kPoints[i]);
      const Reg even = sum<F::kPairs - 1>(d, kTables.without[i], kZeros);
      const Reg odd = sum<F::kPairs - 1>(d, kTables.without[i], kZeros + 1);
      t[kZeros + 2 * i] = Vec::fma(point, even, odd);
      t[kZeros + 2 * i + 1] = Vec::fnma(point, even, odd);
    }
    t[S::kFinite] = sum<F::kPairs>(d, kTables.all, kZeros);
#pragma GCC unroll 4
    for (int i = 0; i < S::kPlain; ++i) t[S::kInterpolated + i] = d[2 * i + 1];
  }

  static inline __attribute__((always_inline)) void output(const Reg (&m)[S::kPoints],
                                                           Reg (&y)[F::kOut]) {
    Reg total[F::kPairs], difference[F::kPairs];
#pragma GCC unroll 3
    for (int i = 0; i < F::kPairs; ++i) {
      total[i] = Vec::add(m[kZeros + 2 * i], m[kZeros + 2 * i + 1]);
      difference[i] = Vec::sub(m[kZeros + 2 * i], m[kZeros + 2 * i + 1]);
    }
#pragma GCC unroll 5
    for (int k = 0; k < F::kOut; ++k) {
      const Reg* half = k % 2 == 0 ? total : difference;
      Reg value = k == 0 ? half[0] : Vec::mul(Vec::set1(kTables.power[0][k]), half[0]);
#pragma GCC unroll 3
      for (int i = 1; i < F::kPairs; ++i) {
        value = Vec::fma(Vec::set1(kTables.power[i][k]), half[i], value);
      }
      if (k == 0 && F::kZero) value = Vec::add(value, m[0]);
      if (k == F::kOut - 1) value = Vec::add(value, m[S::kFinite]);
      if (S::kPlain > 0) value = Vec::add(value, m[S::kInterpolated + k]);
      y[k] = value;
    }
  }

 private:
  // sum of c[k] * (value 2k + first of those that interpolation sees), k = 0 ... kTop; c[kTop]
  // is 1.
  template <int kTop>
  static inline __attribute__((always_inline)) Reg sum(const Reg (&d)[S::kWindow],
                                                       const double (&c)[F::kPairs + 1],
                                                       int first) {
    Reg value = d[F::kStride * (2 * kTop + first)];
#pragma GCC unroll 3
    for (int k = 0; k < kTop; ++k) {
      value = Vec::fma(Vec::set1(c[k]), d[F::kStride * (2 * k + first)], value);
    }
    return value;
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
  typedef TileWindow<F> Place;
  constexpr int kWindow = WinogradSizes<F>::kWindow;
  constexpr int kChannels = Vec::kWidth * Product::kPack;  // of one transform_words
  constexpr int64_t kLineElements = kLine * static_cast<int64_t>(sizeof(float) / sizeof(T));
  const ConvShape& s = args.shape;
  const int64_t count = job.tile_end - job.tile_begin;
  const int64_t stride = values_stride(s, Product::kPack, count);
  const int64_t row_step = s.in_w * s.in_channels;
  const auto first_pixel = [&](const TileCursor& tile, const Place& window) {
    return static_cast<const T*>(args.x) + (tile.image * s.in_h + window.top) * row_step +
           window.left * s.in_channels;
  };
  alignas(64) float copy[kWindow][kWindow][kChannels];
  TileCursor tile(s, F::kOut, job.tile_begin);
  for (int64_t t = 0; t < count; ++t) {
    const Place window(s, tile);
    const T* corner = first_pixel(tile, window);
    tile.next();
    const Place next(s, tile);
    const T* next_corner = first_pixel(tile, next);
    const int64_t next_rows = tile.image < s.batch ? next.rows_to : 0;
    const int64_t shared = tile.col > 0 ? kWindow - Place::kStep : 0;
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

// Fetches what the output transform of a panel will read and write into L2, tile by tile, while the
// products are made: one or two lines of every pixel, each missed on its own. On Zen 4 that halves
// the time of the output transform and makes ResNet-18 1.03 times as fast in float32 at batch 1,
// 1.04 at 8; with AVX2 1.03 to 1.09.
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
      const int64_t top = tile_.row * F::kOut, left = tile_.col * F::kOut;
      const int64_t rows = min_of(F::kOut, s.out_h() - top);
      const int64_t cols = min_of(F::kOut, s.out_w() - left);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t pixel = (tile_.image * s.out_h() + top + i) * s.out_w() + left;
        for (int64_t at = pixel * s.out_channels + channel_, j = 0; j < cols; ++j) {
          fetch_pixel(static_cast<const T*>(args_.y) + at);
          if (args_.residual) fetch_pixel(static_cast<const T*>(args_.residual) + at);
          at += s.out_channels;
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

// sums[point] = values[point] x packed[panel][point] for every point.
template <class F, class Product, typename T>
static void multiply_points(const ConvArgs& args, int64_t count, int64_t panel, const float* values,
                            float* sums, OutputAhead<F, T>& output) {
  constexpr int64_t kPoints = WinogradSizes<F>::kPoints * WinogradSizes<F>::kPoints;
  const ConvShape& s = args.shape;
  const int64_t ahead = ceil_div(count, kPoints);
  const int64_t words = window_words(s, Product::kPack);
  Tile<float> tile = {};
  tile.chunk_step = count * kChunk;
  tile.segments = 1;
  tile.length = words;
  tile.first = true;
  tile.last = false;
  tile.columns = kPanel;
  for (int64_t point = 0; point < kPoints; ++point) {
    tile.panel = args.packed + (panel * kPoints + point) * words * kPanel;
    tile.next = tile.panel + words * kPanel;
    tile.rows = values + point * values_stride(s, Product::kPack, count);
    tile.partial = sums + point * sums_stride(count);
    run_panel<Product>(count, tile);
    output.fetch(ahead);
  }
}

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
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  const int64_t count = job.tile_end - job.tile_begin;
  const int64_t end = min_of(s.out_channels - panel * kPanel, kPanel);
  OutputTile<F, Product, T> out;
  out.stride = sums_stride(count);
  out.low = Vec::set1(args.relu ? 0.0f : -__builtin_inff());
  out.pixel_step = s.out_channels;
  out.row_step = out_w * s.out_channels;
  TileCursor tile(s, F::kOut, job.tile_begin);
  for (int64_t t = 0; t < count; ++t, tile.next()) {
    const int64_t top = tile.row * F::kOut, left = tile.col * F::kOut;
    const int64_t at = ((tile.image * out_h + top) * out_w + left) * s.out_channels;
    out.rows = min_of(F::kOut, out_h - top);
    out.cols = min_of(F::kOut, out_w - left);
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

template <class F, class Product, typename T, bool kRaw = false>
static void run_winograd(const ConvArgs& args, const WinogradJob& job, float* scratch) {
  constexpr int64_t kPoints = WinogradSizes<F>::kPoints * WinogradSizes<F>::kPoints;
  const int64_t count = job.tile_end - job.tile_begin;
  float* sums = scratch + kPoints * values_stride(args.shape, Product::kPack, count);
  if (!job.values_ready) transform_inputs<F, Product, T>(args, job, scratch);
  for (int64_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
    OutputAhead<F, T> output(args, job, panel);
    if constexpr (kRaw) {
      output.fetch(count);
      multiply_raw<F>(args, count, panel, scratch, sums);
    } else {
      multiply_points<F, Product, T>(args, count, panel, scratch, sums, output);
    }
    transform_outputs<F, Product, T>(args, job, panel, sums);
  }
}

template <class F, bool kRaw = false>
static void run_winograd_dtype(const ConvArgs& args, const WinogradJob& job, float* scratch) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_winograd<F, FloatProduct, float, kRaw>(args, job, scratch);
    case DType::kBFloat16:
      return run_winograd<F, FloatProduct, BFloat16, kRaw>(args, job, scratch);
    case DType::kFloat16:
      return run_winograd<F, FloatProduct, Float16, kRaw>(args, job, scratch);
    case DType::kFloat64:
      return;  // never planned: double runs on PyTorch's convolution
  }
}

static void winograd_job(const ConvArgs& args, const WinogradJob& job, float* scratch) {
  switch (args.plan) {
    case Plan::kWinograd2:
      return run_winograd_dtype<Winograd2>(args, job, scratch);
    case Plan::kWinograd4:
      return run_winograd_dtype<Winograd4>(args, job, scratch);
    case Plan::kWinograd4Raw:
      return run_winograd_dtype<Winograd4, true>(args, job, scratch);
    case Plan::kWinograd5:
      return run_winograd_dtype<Winograd5>(args, job, scratch);
    case Plan::kWinograd2S2:
      return run_winograd_dtype<Winograd2S2>(args, job, scratch);
    case Plan::kWinograd4S2:
      return run_winograd_dtype<Winograd4S2>(args, job, scratch);
#ifdef RESNET_FUSED_BF16_PRODUCTS
    case Plan::kWinograd2Bf16:
      return run_winograd<Winograd2, Bf16Product, BFloat16>(args, job, scratch);
    case Plan::kWinograd2S2Bf16:
      return run_winograd<Winograd2S2, Bf16Product, BFloat16>(args, job, scratch);
#endif
    default:
      return;  // not a Winograd plan, or not one of this instruction set: refused by ConvJobs
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
