// The implicit-GEMM kernel, written once over `Vec` and compiled once per instruction set.
//
// A job runs slice by slice over the reduction: gather the input rows of the slice, then for every
// panel and every group of Vec::kRows rows one register tile of (rows x 2 vectors) accumulates it.
// The last slice ends in the epilogue, in registers: scale, shift, residual, activation, store.
//
// Why it looks like this (measured on one core of a Xeon with two 512-bit FMA units, 200 GFLOP/s):
//  - 14 x 2 registers need 16 loads for 28 FMAs, so neither the load ports nor the latency bind.
//  - Rows are gathered in chunks of 16 because a constant distance between the rows of a tile lets
//    every broadcast use one base register; reading NHWC rows in place would need 14 of them.
//  - Gathering takes 15% of the time at 64 output channels and shrinks with more: each gathered
//    row serves all panels of a job.
//  - One reduction step per loop iteration: unrolled by 2 or more, gcc 12 shuffles accumulators
//    between registers (185 against 175 GFLOP/s with all operands in L1). Whole 3x3 layers of
//    ResNet-18 run at 145 to 166.
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

// Copies one segment to rows[chunk][row][16] of one row; chunks are `step` floats apart.
template <typename T>
static inline void copy_segment(float* target, int64_t step, const T* source, int64_t length) {
  for (; length >= kChunk; length -= kChunk, source += kChunk, target += step) {
    copy_chunk(target, source);
  }
  for (int64_t i = 0; i < length; i += Vec::kWidth) {
    Vec::store(target + i, Vec::load(source + i, min_of(length - i, Vec::kWidth)));
  }
}

static inline void zero_segment(float* target, int64_t step, int64_t length) {
  for (; length > 0; length -= kChunk, target += step) zero_chunk(target);
}

// A row of taps of which only elements [begin, end) lie inside the image.
template <typename T>
static void copy_clipped(float* target, int64_t step, const T* source, int64_t length,
                         int64_t begin, int64_t end) {
  zero_segment(target, step, length);
  for (int64_t i = begin; i < end; ++i) {
    target[i / kChunk * step + i % kChunk] = to_float(source[i]);
  }
}

// Gathers segments [begin, end) of the job's rows.
template <typename T>
static void gather(const ConvArgs& args, const Segments& segments, const DirectJob& job,
                   int64_t begin, int64_t end, float* rows) {
  const ConvShape& s = args.shape;
  const int64_t count = job.row_end - job.row_begin;
  const int64_t step = count * kChunk;
  const int64_t length = segments.length;
  const int64_t taps = segments.kernel_rows ? 1 : s.kernel_w;  // segments of one kernel row
  const T* x = static_cast<const T*>(args.x) + job.group * s.group_in();
  PixelCursor pixel(s, job.row_begin);
  for (int64_t r = 0; r < count; ++r, pixel.next()) {
    float* target = rows + r * kChunk;
    const T* image = x + pixel.image * s.in_h * s.in_w * s.in_channels;
    const int64_t left = pixel.left();
    // Elements of a row of taps that lie inside the image.
    const int64_t lo = left < 0 ? -left * s.in_channels : 0;
    const int64_t hi = min_of((s.in_w - left) * s.in_channels, length);
    int64_t ky = begin / taps, kx = begin % taps;
    for (int64_t segment = begin; segment < end; ++segment, target += segments.chunks() * step) {
      const int64_t iy = pixel.top() + ky * s.dilation_h;
      const int64_t ix = left + kx * s.dilation_w;
      const T* source = image + (iy * s.in_w + ix) * s.in_channels;
      const bool row_inside = iy >= 0 && iy < s.in_h;
      if (segments.kernel_rows) {
        if (row_inside && lo == 0 && hi == length) {
          copy_segment(target, step, source, length);
        } else if (row_inside) {
          copy_clipped(target, step, source, length, lo, hi);
        } else {
          zero_segment(target, step, length);
        }
      } else if (row_inside && ix >= 0 && ix < s.in_w) {
        copy_segment(target, step, source, length);
      } else {
        zero_segment(target, step, length);
      }
      if (++kx == taps) {
        kx = 0;
        ++ky;
      }
    }
  }
}

// One register tile's operands. Strides in elements.
template <typename T>
struct Tile {
  const float* rows;   // [segment][chunk][row][16], at this tile's first row
  int64_t chunk_step;  // distance between chunks of `rows`
  const float* panel;  // [reduction][32]
  int64_t segments;    // of this slice of the reduction
  int64_t length;      // steps of a segment
  float* partial;      // [row][32]: sums between slices
  bool first, last;    // first slice starts from zero; last slice runs the epilogue
  int64_t columns;     // output channels in this panel, at most 32
  const float* scale;  // at the panel's first channel, like shift, residual and y
  const float* shift;
  const T* residual;
  T* y;
  int64_t y_stride;  // distance between output pixels
  float low;         // lower bound of the activation: 0 or -infinity
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
    for (int64_t segment = 0; segment < tile.segments; ++segment) {
      for (int64_t left = tile.length; left > 0; left -= kChunk, rows += tile.chunk_step) {
        const int64_t steps = min_of(left, kChunk);
#pragma GCC unroll 1
        for (int64_t k = 0; k < steps; ++k, panel += kPanel) {
          // Weights that are used once come from L3 or memory, and the few line buffers of L1 alone
          // cannot keep enough of them on the way: 32 KiB ahead into L2, 2 KiB ahead into L1. Worth
          // 6-13% of a Winograd layer whose weights are cold, against 4 KiB ahead into L1.
          __builtin_prefetch(panel + 8192, 0, 2);
          __builtin_prefetch(panel + 8208, 0, 2);
          __builtin_prefetch(panel + 512);
          __builtin_prefetch(panel + 528);
          multiply_step<kTileRows>(rows + k, panel, sum);
        }
      }
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
          if (tile.residual)
            value = Vec::add(value, Vec::load(tile.residual + r * tile.y_stride + at));
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
  const Segments segments(s);
  const int64_t count = job.row_end - job.row_begin;
  const int64_t reduction = s.reduction();
  const int64_t panels = panels_of(s.group_out());
  float* rows = scratch;
  float* partial = scratch + count * job.slice * segments.chunks() * kChunk;
  // Slices of one segment may be dead; if all are, the last one, gathered as zeros, still runs.
  int64_t last_live = segments.count - 1;
  while (job.slice == 1 && last_live > 0 && !segments.live(s, last_live)) --last_live;
  bool first = true;
  for (int64_t begin = 0; begin <= last_live; begin += job.slice) {
    if (job.slice == 1 && begin < last_live && !segments.live(s, begin)) continue;
    const int64_t end = min_of(begin + job.slice, segments.count);
    gather<T>(args, segments, job, begin, end, rows);
    for (int64_t p = job.panel_begin; p < job.panel_end; ++p) {
      const int64_t channel = job.group * s.group_out() + p * kPanel;
      const int64_t offset = job.row_begin * s.out_channels + channel;
      Tile<T> tile;
      tile.chunk_step = count * kChunk;
      tile.panel =
          args.packed + ((job.group * panels + p) * reduction + begin * segments.length) * kPanel;
      tile.segments = end - begin;
      tile.length = segments.length;
      tile.first = first;
      tile.last = end > last_live;
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
    first = false;
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
