// The implicit-GEMM kernel, written once over `Vec` and compiled once per instruction set.
//
// A job runs slice by slice over the reduction: gather the input rows of the slice, then for every
// panel and every group of Vec::kRows rows one register tile of (rows x 2 vectors) accumulates it.
// The last slice ends in the epilogue, in registers: scale, shift, residual, activation, store.
//
// Why it looks like this (2 cores with AVX-512, batch 1; share of the measured FMA peak):
//  - 14 x 2 registers need 16 loads for 28 FMAs, so neither the load ports nor the latency bind.
//  - Rows are gathered in chunks of 16 because a constant distance between the rows of a tile lets
//    every broadcast use one base register; reading NHWC rows in place would need 14 of them.
//  - Gathering costs 2 / out_channels of the multiplications, 3% at 64 channels.
//  - One reduction step per loop iteration: unrolled by 2 or more, gcc 12 shuffles accumulators between
//    registers (185 against 175 GFLOP/s a core with all operands in L1, of 200 possible).
#include "cpu/direct.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

typedef Vec::Reg Reg;

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename T>
static inline void copy_chunk(float* target, const T* source) {
  for (int i = 0; i < kChunk; i += Vec::kWidth) Vec::store(target + i, Vec::load(source + i));
}

static inline void zero_chunk(float* target) {
  for (int i = 0; i < kChunk; i += Vec::kWidth) Vec::store(target + i, Vec::zero());
}

// Walks the output pixels of a job in order and gives the input position of each one's first tap.
struct PixelCursor {
  const ConvShape& shape;
  int64_t out_h, out_w;
  int64_t image, row, col;

  PixelCursor(const ConvShape& conv, int64_t pixel)
      : shape(conv), out_h(conv.out_h()), out_w(conv.out_w()) {
    col = pixel % out_w;
    row = pixel / out_w % out_h;
    image = pixel / out_w / out_h;
  }
  int64_t top() const { return row * shape.stride_h - shape.pad_h; }
  int64_t left() const { return col * shape.stride_w - shape.pad_w; }
  void next() {
    if (++col < out_w) return;
    col = 0;
    if (++row < out_h) return;
    row = 0;
    ++image;
  }
};

// Gathers reduction steps [begin, end) where every tap is a whole number of chunks.
template <typename T>
static void gather_whole(const ConvArgs& args, const DirectJob& job, int64_t begin, int64_t end,
                         float* rows) {
  const ConvShape& s = args.shape;
  const int64_t count = job.row_end - job.row_begin;
  const int64_t per_tap = s.group_in() / kChunk;
  const int64_t first_tap = begin / kChunk / per_tap;
  const int64_t first_chunk = begin / kChunk % per_tap;
  const int64_t chunks = (end - begin) / kChunk;
  const T* x = static_cast<const T*>(args.x) + job.group * s.group_in();
  PixelCursor pixel(s, job.row_begin);
  for (int64_t r = 0; r < count; ++r, pixel.next()) {
    const T* image = x + pixel.image * s.in_h * s.in_w * s.in_channels;
    float* target = rows + r * kChunk;
    int64_t ky = first_tap / s.kernel_w, kx = first_tap % s.kernel_w;
    int64_t chunk = first_chunk;
    for (int64_t left = chunks; left > 0;) {
      const int64_t run = min_of(per_tap - chunk, left);
      const int64_t iy = pixel.top() + ky * s.dilation_h;
      const int64_t ix = pixel.left() + kx * s.dilation_w;
      if (iy >= 0 && iy < s.in_h && ix >= 0 && ix < s.in_w) {
        const T* source = image + (iy * s.in_w + ix) * s.in_channels + chunk * kChunk;
        for (int64_t i = 0; i < run; ++i, target += count * kChunk) {
          copy_chunk(target, source + i * kChunk);
        }
      } else {
        for (int64_t i = 0; i < run; ++i, target += count * kChunk) zero_chunk(target);
      }
      left -= run;
      chunk = 0;
      if (++kx == s.kernel_w) {
        kx = 0;
        ++ky;
      }
    }
  }
}

// Gathered rows under construction, reduction steps [begin, end) of kRows of them. Runs of any length
// are written as whole vectors, so each may spill up to Vec::kWidth - 1 floats, which the next run then
// overwrites. Several rows at a time, because reading a row back at once would wait for its stores.
struct RowBuilder {
  static constexpr int kRows = 8;
  static constexpr int64_t kStride = kMaxSlice + 2 * kChunk;

  int64_t begin, end;
  float buffer[kRows * kStride];

  // Steps [at, at + length) of a row; source null means zeros.
  template <typename T>
  void put(int row, int64_t at, int64_t length, const T* source) {
    int64_t skip = at < begin ? begin - at : 0;
    const int64_t stop = min_of(length, end - at);
    for (float* target = buffer + row * kStride + (at + skip - begin); skip < stop;
         skip += Vec::kWidth, target += Vec::kWidth) {
      const int64_t lanes = min_of(stop - skip, Vec::kWidth);
      Vec::store(target, source ? Vec::load(source + skip, lanes) : Vec::zero());
    }
  }

  // Copies the first `count` rows to rows [chunk][row][16], `row_count` rows a chunk.
  void flush(int count, float* rows, int64_t row_count) {
    const int64_t length = end - begin;
    for (int row = 0; row < count; ++row) {
      float* source = buffer + row * kStride;
      for (int64_t i = length; i % kChunk; ++i) source[i] = 0.0f;
      for (int64_t i = 0; i < length; i += kChunk) {
        copy_chunk(rows + i * row_count + row * kChunk, source + i);
      }
    }
  }
};

// One pixel's part of a row: kernel rows [first_row, last_row) of its window.
template <typename T>
static void build_row(const ConvShape& s, const T* x, const PixelCursor& pixel, int64_t first_row,
                      int64_t last_row, int row, RowBuilder& builder) {
  const T* const zeros = nullptr;
  const int64_t channels = s.group_in();
  const int64_t left = pixel.left();
  // With one group and no dilation the taps of one kernel row are adjacent in memory: one run.
  const bool adjacent = s.groups == 1 && s.dilation_w == 1;
  const int64_t lo = min_of(left < 0 ? -left : 0, s.kernel_w);
  const int64_t hi = left + s.kernel_w > s.in_w ? s.in_w - left : s.kernel_w;
  for (int64_t ky = first_row; ky < last_row; ++ky) {
    const int64_t iy = pixel.top() + ky * s.dilation_h;
    const int64_t at = ky * s.kernel_w * channels;
    const T* line = x + (pixel.image * s.in_h + iy) * s.in_w * s.in_channels;
    if (iy < 0 || iy >= s.in_h || (adjacent && hi <= lo)) {
      builder.put(row, at, s.kernel_w * channels, zeros);
    } else if (adjacent && hi - lo == s.kernel_w) {
      builder.put(row, at, s.kernel_w * channels, line + left * channels);
    } else if (adjacent) {
      builder.put(row, at, lo * channels, zeros);
      builder.put(row, at + lo * channels, (hi - lo) * channels, line + (left + lo) * channels);
      builder.put(row, at + hi * channels, (s.kernel_w - hi) * channels, zeros);
    } else {
      for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
        const int64_t ix = left + kx * s.dilation_w;
        const bool inside = ix >= 0 && ix < s.in_w;
        builder.put(row, at + kx * channels, channels, inside ? line + ix * s.in_channels : zeros);
      }
    }
  }
}

// Gathers reduction steps [begin, end) for any channel count: the RGB stem, odd channels, groups.
template <typename T>
static void gather_any(const ConvArgs& args, const DirectJob& job, int64_t begin, int64_t end,
                       float* rows) {
  const ConvShape& s = args.shape;
  const int64_t count = job.row_end - job.row_begin;
  const int64_t row_steps = s.kernel_w * s.group_in();
  const T* x = static_cast<const T*>(args.x) + job.group * s.group_in();
  RowBuilder builder;
  builder.begin = begin;
  builder.end = end;
  PixelCursor pixel(s, job.row_begin);
  for (int64_t r = 0; r < count; r += RowBuilder::kRows) {
    const int batch = static_cast<int>(min_of(RowBuilder::kRows, count - r));
    for (int row = 0; row < batch; ++row, pixel.next()) {
      build_row(s, x, pixel, begin / row_steps, ceil_div(end, row_steps), row, builder);
    }
    builder.flush(batch, rows + r * kChunk, count);
  }
}

// One register tile's operands. Strides in elements.
template <typename T>
struct Tile {
  const float* rows;    // [chunk][row][16], at this tile's first row
  int64_t chunk_step;   // distance between chunks of `rows`
  const float* panel;   // [reduction][32]
  int64_t steps;        // length of this slice of the reduction
  float* partial;       // [row][32]: sums between slices
  bool first, last;     // first slice starts from zero; last slice runs the epilogue
  int64_t columns;      // output channels in this panel, at most 32
  const float* scale;   // at the panel's first channel, like shift, residual and y
  const float* shift;
  const T* residual;
  T* y;
  int64_t y_stride;     // distance between output pixels
  float low;            // lower bound of the activation: 0 or -infinity
};

template <int kTileRows>
static inline __attribute__((always_inline)) void multiply_step(const float* rows,
                                                                const float* panel,
                                                                Reg (&sum)[kTileRows][2]) {
  const Reg w0 = Vec::load(panel);
  const Reg w1 = Vec::load(panel + Vec::kWidth);
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    const Reg value = Vec::set1(rows[r * kChunk]);
    sum[r][0] = Vec::fma(value, w0, sum[r][0]);
    sum[r][1] = Vec::fma(value, w1, sum[r][1]);
  }
}

template <int kTileRows, typename T>
static __attribute__((noinline)) void run_tile(const Tile<T>& tile) {
  for (int col = 0; col < kPanel && col < tile.columns; col += 2 * Vec::kWidth) {
    Reg sum[kTileRows][2];
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const float* partial = tile.partial + r * kPanel + col;
      sum[r][0] = tile.first ? Vec::zero() : Vec::load(partial);
      sum[r][1] = tile.first ? Vec::zero() : Vec::load(partial + Vec::kWidth);
    }
    const float* rows = tile.rows;
    const float* panel = tile.panel + col;
    int64_t steps = tile.steps;
    for (; steps >= kChunk; steps -= kChunk, rows += tile.chunk_step) {
#pragma GCC unroll 1
      for (int k = 0; k < kChunk; ++k, panel += kPanel) {
        // Weights come from L2 or beyond: 4 KiB ahead is worth 3-10% where they are used once.
        __builtin_prefetch(panel + 1024);
        __builtin_prefetch(panel + 1040);
        multiply_step<kTileRows>(rows + k, panel, sum);
      }
    }
    for (int64_t k = 0; k < steps; ++k, panel += kPanel) {
      multiply_step<kTileRows>(rows + k, panel, sum);
    }
    if (!tile.last) {
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        Vec::store(tile.partial + r * kPanel + col, sum[r][0]);
        Vec::store(tile.partial + r * kPanel + col + Vec::kWidth, sum[r][1]);
      }
      continue;
    }
    const Reg low = Vec::set1(tile.low);
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const int64_t at = col + v * Vec::kWidth;
      const int64_t lanes = tile.columns - at;
      if (lanes <= 0) continue;
      if (lanes >= Vec::kWidth) {
        const Reg scale = Vec::load(tile.scale + at);
        const Reg shift = Vec::load(tile.shift + at);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          Reg value = Vec::fma(sum[r][v], scale, shift);
          if (tile.residual) value = Vec::add(value, Vec::load(tile.residual + r * tile.y_stride + at));
          Vec::store(tile.y + r * tile.y_stride + at, Vec::at_least(value, low));
        }
      } else {
        const Reg scale = Vec::load(tile.scale + at, lanes);
        const Reg shift = Vec::load(tile.shift + at, lanes);
#pragma GCC unroll 16
        for (int r = 0; r < kTileRows; ++r) {
          Reg value = Vec::fma(sum[r][v], scale, shift);
          if (tile.residual) {
            value = Vec::add(value, Vec::load(tile.residual + r * tile.y_stride + at, lanes));
          }
          Vec::store(tile.y + r * tile.y_stride + at, Vec::at_least(value, low), lanes);
        }
      }
    }
  }
}

template <typename T, int kTileRows>
struct TileTable {
  static void run(int64_t rows, const Tile<T>& tile) {
    if (rows == kTileRows) {
      run_tile<kTileRows, T>(tile);
    } else {
      TileTable<T, kTileRows - 1>::run(rows, tile);
    }
  }
};

template <typename T>
struct TileTable<T, 0> {
  static void run(int64_t, const Tile<T>&) {}
};

template <typename T>
static void run_job(const ConvArgs& args, const DirectJob& job, float* scratch) {
  const ConvShape& s = args.shape;
  const int64_t count = job.row_end - job.row_begin;
  const int64_t reduction = s.reduction();
  const int64_t panels = panels_of(s.group_out());
  const bool whole = s.group_in() % kChunk == 0;
  float* rows = scratch;
  float* partial = scratch + count * job.slice;
  for (int64_t begin = 0; begin < reduction; begin += job.slice) {
    const int64_t end = min_of(begin + job.slice, reduction);
    if (whole) {
      gather_whole<T>(args, job, begin, end, rows);
    } else {
      gather_any<T>(args, job, begin, end, rows);
    }
    for (int64_t p = job.panel_begin; p < job.panel_end; ++p) {
      const int64_t channel = job.group * s.group_out() + p * kPanel;
      const int64_t offset = job.row_begin * s.out_channels + channel;
      Tile<T> tile;
      tile.chunk_step = count * kChunk;
      tile.panel = args.packed + ((job.group * panels + p) * reduction + begin) * kPanel;
      tile.steps = end - begin;
      tile.first = begin == 0;
      tile.last = end == reduction;
      tile.columns = min_of(kPanel, s.group_out() - p * kPanel);
      tile.scale = args.scale + channel;
      tile.shift = args.shift + channel;
      tile.y_stride = s.out_channels;
      tile.low = args.relu ? 0.0f : -__builtin_inff();
      // Row groups as equal as possible: 49 rows are 13 + 12 + 12 + 12, not 14 + 14 + 14 + 7.
      const int64_t groups = ceil_div(count, Vec::kRows);
      for (int64_t g = 0, r = 0; g < groups; ++g) {
        const int64_t size = (count - r) / (groups - g) + ((count - r) % (groups - g) != 0);
        tile.rows = rows + r * kChunk;
        tile.partial = partial + ((p - job.panel_begin) * count + r) * kPanel;
        tile.residual = args.residual
                            ? static_cast<const T*>(args.residual) + offset + r * s.out_channels
                            : nullptr;
        tile.y = static_cast<T*>(args.y) + offset + r * s.out_channels;
        TileTable<T, Vec::kRows>::run(size, tile);
        r += size;
      }
    }
  }
}

static void direct_job(const ConvArgs& args, const DirectJob& job, float* scratch) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_job<float>(args, job, scratch);
    case DType::kBFloat16:
      return run_job<BFloat16>(args, job, scratch);
    case DType::kFloat16:
      return run_job<Float16>(args, job, scratch);
    case DType::kFloat64:
      return;  // never planned: double runs on PyTorch's convolution
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
