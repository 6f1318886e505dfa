// The register tile of all matrix products: up to Vec::kRows rows by one panel of 32 columns,
// written once over `Vec` and over what one 32-bit word of an operand holds.
//
//   rows [segment][chunk][row][16 words]    panel [word of the reduction][32 words]
//
// A word is one float, or a pair of bfloat16 that one instruction multiplies and adds up in float32
// (Bf16Product). The last slice of a convolution's reduction ends in the epilogue, in registers:
// scale, shift, residual, activation, store.
//
// Why it looks like this:
//  - 14 x 2 registers need 16 loads for 28 multiply-adds, so neither the load ports nor the latency
//    bind: 93-97% of the peak on a core that starts one a cycle (Zen 4), 175 of 200 GFLOP/s on a
//    Xeon that starts two.
//  - Rows lie in chunks of 16 words because a constant distance between the rows of a tile lets
//    every broadcast use one base register; reading NHWC rows in place would need 14 of them.
//  - AVX2 has 16 registers. 3 x 4 sums, 3 weights and a broadcast take them all; the fourth vector
//    of weights is an operand of its multiply-adds. That is 18 instructions for 12 multiply-adds,
//    where 6 x 2 sums take 20, and four steps an iteration (Vec::kSteps) leave one more for the
//    loop, not four. It counts because a core whose other thread is at work starts some 3 a cycle,
//    not 6: ResNet-50's 1x1 layers got 1.13 to 1.18 times as fast there, and 1.05 times where the
//    core was free (Zen 3; 6 x 2 by four steps: 1.06 and 1.00, two vectors from memory: 1.05 and
//    1.02). It takes assembly (Vec::multiply_row): where gcc may move sums, four steps lose 5%,
//    as 2 or more do on AVX-512 (175 for 185 GFLOP/s with all operands in L1), which keeps to one.
//  - Nor has AVX2 a load port left for prefetches: with those of fetch_ahead the kernel reached 67%
//    of the peak at 256 words, without 93%. There the next panel's weights are fetched chunk by
//    chunk (Tile::next), and a long panel is done slab by slab (run_panel).
#include "cpu/direct.h"
#include "cpu/l2.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

typedef Vec::Reg Reg;

constexpr int64_t kLine = 16;  // floats of a cache line

// The accumulators of a register tile.
template <int kTileRows, int kVectors = Vec::kVectors>
using Sums = Reg[kTileRows][kVectors];

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct FloatProduct {
  typedef float Element;
  static constexpr int64_t kPack = 1;  // elements of a word
  static Reg multiply_add(Reg a, Reg b, Reg sum) { return Vec::fma(a, b, sum); }
  // Vec::kWidth words of a row, or the words of the first `count` elements, from a tensor.
  template <typename T>
  static Reg load(const T* source) {
    return Vec::load(source);
  }
  template <typename T>
  static Reg load(const T* source, int64_t count) {
    return Vec::load(source, min_of(count, Vec::kWidth));
  }
  template <typename T>
  static Element element(T value) {
    return to_float(value);
  }
  // Results of a convolution, all lanes or `count` of them.
  template <typename T, typename... Count>
  static void store(T* target, Reg value, Count... count) {
    Vec::store(target, value, count...);
  }
};

#ifdef RESNET_FUSED_BF16_PRODUCTS
struct Bf16Product {
  typedef BFloat16 Element;
  static constexpr int64_t kPack = 2;
  static Reg multiply_add(Reg a, Reg b, Reg sum) { return Vec::dot_bf16(a, b, sum); }
  static Reg load(const BFloat16* source) {
    return Vec::load(reinterpret_cast<const float*>(source));
  }
  static Reg load(const BFloat16* source, int64_t count) { return Vec::load_halves(source, count); }
  static Element element(BFloat16 value) { return value; }
  template <typename... Count>
  static void store(BFloat16* target, Reg value, Count... count) {
    Vec::store_flushed(target, value, count...);
  }
  template <typename... Count>
  static void store(float* target, Reg value, Count... count) {
    Vec::store(target, value, count...);
  }
};
#endif

// Whether the input is worth fetching for a thread's next job. A smaller one is still in L2, where
// the layer before has left it: at batch 1 fetching it again gains nothing (0.98 to 1.00 a layer).
template <typename T>
static inline bool exceeds_l2(const ConvShape& s) {
  return s.batch * s.in_h * s.in_w * s.in_channels * static_cast<int64_t>(sizeof(T)) > l2_bytes();
}

// Rows of the input that come next, fetched into L2 a few lines with every chunk: all at once they
// would keep the core waiting as long as reading them does.
struct RowsAhead {
  const void* const* rows = nullptr;
  int64_t count = 0;  // of rows
  int64_t lines = 0;  // of a row: cache lines
  int64_t line = 0;   // of rows[0] that comes next
  int64_t each = 0;   // lines to fetch with every chunk

  inline __attribute__((always_inline)) void fetch() {
    for (int64_t i = 0; i < each && count > 0; ++i) {
      __builtin_prefetch(static_cast<const float*>(rows[0]) + line * kLine, 0, 2);
      if (++line < lines) continue;
      line = 0;
      ++rows;
      --count;
    }
  }
};

// Operands of a panel's register tiles. Strides in elements; rows and panel in words. It is filled
// in once and never copied: a vector load from where single fields were just stored waits until all
// stores before it have left the core, which took 4% of ResNet-18 in bfloat16 at batch 1 (Zen 4).
template <typename T>
struct Tile {
  const float* rows;   // [segment][chunk][row][16], at the first of the panel's rows, like partial,
                       // residual and y
  int64_t chunk_step;  // distance between chunks of `rows`
  const float* panel;  // [word][32]
  int64_t segments;    // of this slice of the reduction
  int64_t length;      // words of a segment
  float* partial;      // [row][32]: sums between blocks and slices
  bool first, last;    // first slice starts from zero; last slice runs the epilogue
  int64_t columns;     // output channels in this panel, at most 32
  // What to do of it now: chunks of the slice and columns of the panel.
  int64_t begin, end;
  int64_t from, to;
  const float* next;   // weights to fetch into L2 meanwhile,
  int64_t lines;       // so many cache lines with every chunk
  const float* scale;  // at the panel's first channel, like shift, residual and y
  const float* shift;
  const T* residual;
  T* y;
  int64_t y_stride;  // distance between output pixels
  float low;         // lower bound of the activation: 0 or -infinity
  RowsAhead* ahead;  // may be null
};

// One word of the reduction, for rows that lie `row_step` words apart.
template <class Product, class V = Vec, int kTileRows, int kVectors>
static inline __attribute__((always_inline)) void multiply_step(const float* rows, int64_t row_step,
                                                                const float* panel,
                                                                Reg (&sum)[kTileRows][kVectors]) {
  if constexpr (V::kInAssembly && kVectors == V::kVectors) {
    typename V::Weights weights;
    V::load_weights(panel, weights);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
      V::multiply_row(sum[r], rows + r * row_step, panel, weights);
  } else {
    Reg weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = Vec::load(panel + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Reg value = Vec::set1(rows[r * row_step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = Product::multiply_add(value, weights[v], sum[r][v]);
      }
    }
  }
}

// Weights that are used once come from L3 or memory, and the few line buffers of L1 alone cannot
// keep enough of them on the way: they are fetched 32 KiB ahead into L2 and 2 KiB ahead into L1,
// worth 6-13% of a Winograd layer whose weights are cold, against 4 KiB ahead into L1. (Inlined by
// force: gcc takes a call that only fetches for one without effects, and leaves it out.)
static inline __attribute__((always_inline)) void fetch_ahead(const float* panel) {
  __builtin_prefetch(panel + 8192, 0, 2);
  __builtin_prefetch(panel + 8192 + kLine, 0, 2);
  __builtin_prefetch(panel + 512);
  __builtin_prefetch(panel + 512 + kLine);
}

// `steps` words of the reduction. kFetch: with the weights that come later, where load ports are
// free.
template <class Product, bool kFetch, int kTileRows, int kVectors>
static inline __attribute__((always_inline)) void multiply_steps(const float* rows,
                                                                 int64_t row_step,
                                                                 const float* panel, int64_t steps,
                                                                 Reg (&sum)[kTileRows][kVectors]) {
  constexpr int kSteps = kVectors == Vec::kVectors ? Vec::kSteps : 1;
  // gcc must not know of whole chunks: it would treat them apart, and keep sums in memory
  // meanwhile.
  if constexpr (kSteps > 1) __asm__("" : "+r"(steps));
  int64_t k = 0;
  if constexpr (kSteps > 1) {
#pragma GCC unroll 1
    for (; k + kSteps <= steps; k += kSteps, panel += kSteps * kPanel) {
#pragma GCC unroll 16
      for (int i = 0; i < kSteps; ++i) {
        if constexpr (kFetch) fetch_ahead(panel + i * kPanel);
        multiply_step<Product>(rows + k + i, row_step, panel + i * kPanel, sum);
      }
    }
  }
#pragma GCC unroll 1
  for (; k < steps; ++k, panel += kPanel) {
    if constexpr (kFetch) fetch_ahead(panel);
    multiply_step<Product>(rows + k, row_step, panel, sum);
  }
}

// Words summed in one go. Float sums of n terms are off by about sqrt(n) roundings, so longer ones
// are cut into blocks whose totals are kept in `partial`: at 512 channels a 3 x 3 convolution's
// error falls from 1.2e-6 to 3e-7, and F(4x4, 3x3)'s from 2.0e-6 to 1.0e-6, for 2% of the time.
constexpr int64_t kBlockChunks = 8;

template <int kTileRows, int kVectors>
static inline __attribute__((always_inline)) void clear(Reg (&sum)[kTileRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vec::zero();
  }
}

// sum += partial, in which nothing was stored yet if `first`.
template <int kTileRows, int kVectors>
static inline __attribute__((always_inline)) void add_partial(const float* partial, bool first,
                                                              Reg (&sum)[kTileRows][kVectors]) {
  if (first) return;
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vec::add(sum[r][v], Vec::load(partial + r * kPanel + v * Vec::kWidth));
    }
  }
}

template <int kTileRows, int kVectors>
static inline __attribute__((always_inline)) void store_partial(
    float* partial, const Reg (&sum)[kTileRows][kVectors]) {
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vec::store(partial + r * kPanel + v * Vec::kWidth, sum[r][v]);
    }
  }
}

// at += step, from one row of a tile to the next. Hidden from gcc, which would work out all rows'
// addresses ahead of the products and, for want of registers, keep them in vector registers: the
// function was twice as long, and the 1x1 layer of stride 2 from 64 to 128 channels took 1.03 times
// as long, others the same (Zen 4).
template <typename T>
static inline __attribute__((always_inline)) void step_on(T*& at, int64_t step) {
  at += step;
  __asm__("" : "+r"(at));
}

// What the epilogue will read and write, fetched while the products are made: each line of it is
// missed on its own, since a tile takes one or two from every row. From 64 to 256 channels at 56 x
// 56 and batch 8 that makes a layer 1.1 times as fast, on Zen 3 and 4, with a residual 1.2 to 1.3
// (Zen 3); with one image, whose output stays in L2, 0.98 (Zen 4).
template <int kTileRows, int kVectors, typename T>
static inline __attribute__((always_inline)) void fetch_ends(const Tile<T>& tile, int64_t row,
                                                             int64_t col) {
  constexpr int64_t kStep = kLine * static_cast<int64_t>(sizeof(float) / sizeof(T));
  const T* residual = tile.residual ? tile.residual + row * tile.y_stride + col : nullptr;
  const T* y = tile.y + row * tile.y_stride + col;
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int64_t line = 0; line < kVectors * Vec::kWidth; line += kStep) {
      if (residual) __builtin_prefetch(residual + line);
      __builtin_prefetch(y + line, 1);
    }
    step_on(residual, tile.y_stride);
    step_on(y, tile.y_stride);
  }
}

// The results of vector `v` of a tile's columns, at column `at`, all lanes of it or `lanes`. What
// it needs of the tile is copied, because the compiler must think that the stores of vectors change
// it.
template <class Product, int kTileRows, int kVectors, typename T, typename... Lanes>
static inline __attribute__((always_inline)) void finish_vector(
    const Tile<T>& tile, int64_t row, int64_t at, int v, const Reg (&sum)[kTileRows][kVectors],
    Lanes... lanes) {
  const Reg scale = Vec::load(tile.scale + at, lanes...);
  const Reg shift = Vec::load(tile.shift + at, lanes...);
  const Reg low = Vec::set1(tile.low);
  const int64_t step = tile.y_stride;
  const T* residual = tile.residual ? tile.residual + row * step + at : nullptr;
  T* y = tile.y + row * step + at;
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
    Reg value = Vec::fma(sum[r][v], scale, shift);
    if (residual) {
      value = Vec::add(value, Vec::load(residual, lanes...));
      step_on(residual, step);
    }
    Product::store(y, Vec::at_least(value, low), lanes...);
    step_on(y, step);
  }
}

// `tiles` register tiles one below the other from `row` on, by the chunks and columns that `tile`
// names. Moves `tile.next` on.
template <class Product, int kTileRows, int kVectors, typename T>
static __attribute__((noinline)) void run_tiles(int64_t row, int64_t tiles, Tile<T>& tile) {
  constexpr int64_t kPass = kVectors * Vec::kWidth;      // columns of a register tile
  const int64_t chunks = ceil_div(tile.length, kChunk);  // of a segment
  const int64_t segment = tile.begin / chunks, skipped = tile.begin % chunks;
  const bool last = tile.last && tile.end == tile.segments * chunks;
  const float* const weights =
      tile.panel + (segment * tile.length + skipped * kChunk) * kPanel + tile.from;
  const float* next = tile.next;
  for (; tiles > 0; --tiles, row += kTileRows) {
    const float* panel_at = weights;
    for (int64_t col = tile.from; col < tile.to; col += kPass, panel_at += kPass) {
      Sums<kTileRows, kVectors> sum;
      float* partial = tile.partial + row * kPanel + col;
      bool first = tile.first && tile.begin == 0;
      const float* rows = tile.rows + row * kChunk + tile.begin * tile.chunk_step;
      const float* panel = panel_at;
      int64_t in_segment = chunks - skipped;  // chunks left of it
      if (last) fetch_ends<kTileRows, kVectors>(tile, row, col);
      int64_t left = tile.end - tile.begin;  // at least one chunk
      do {
        clear(sum);
        const int64_t block = min_of(left, kBlockChunks);
        left -= block;
        for (int64_t chunk = 0; chunk < block; ++chunk, rows += tile.chunk_step) {
          const int64_t steps = in_segment > 1 ? kChunk : tile.length - (chunks - 1) * kChunk;
          in_segment = in_segment > 1 ? in_segment - 1 : chunks;
          multiply_steps<Product, Vec::kFetchesEachStep>(rows, kChunk, panel, steps, sum);
          for (int64_t line = 0; line < tile.lines; ++line, next += kLine) {
            __builtin_prefetch(next, 0, 2);
          }
          panel += steps * kPanel;
          if (tile.ahead) tile.ahead->fetch();
        }
        add_partial(partial, first, sum);
        if (left > 0 || !last) store_partial(partial, sum);
        first = false;
      } while (left > 0);
      if (!last) continue;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = col + v * Vec::kWidth;
        const int64_t lanes = tile.columns - at;
        if (lanes >= Vec::kWidth) {
          finish_vector<Product>(tile, row, at, v, sum);
        } else if (lanes > 0) {
          finish_vector<Product>(tile, row, at, v, sum, lanes);
        }
      }
    }
  }
  tile.next = next;
}

template <class Product, int kTileRows, int kVectors, typename T>
static void run_rows(int64_t rows, int64_t row, int64_t tiles, Tile<T>& tile) {
  if (rows == kTileRows) {
    run_tiles<Product, kTileRows, kVectors>(row, tiles, tile);
  } else if constexpr (kTileRows > 1) {
    run_rows<Product, kTileRows - 1, kVectors>(rows, row, tiles, tile);
  }
}

// `count` rows by one panel; `tile` describes them, and the panel that comes next.
//
// The weights that a tile of few rows runs through may fill L1 before the next tile wants them
// again. Slab by slab, and pass by pass over a slab's columns, they stay there: on AVX2 slabs of 8
// chunks make layers of 512 to 2048 channels 1.1 to 1.2 times as fast as whole panels, and up to
// 1.06 times as fast as slabs of 4 or 16. Where all is one slab, passes outside would only cost (5%
// at 64 words).
template <class Product, int kTileRows, int kVectors, typename T>
static void run_panel_by(int64_t count, Tile<T>& tile) {
  constexpr int64_t kPass = kVectors * Vec::kWidth;
  const int64_t chunks = tile.segments * ceil_div(tile.length, kChunk);
  const bool whole = chunks <= Vec::kSlab;
  const int64_t slab = whole ? chunks : Vec::kSlab, columns = whole ? tile.columns : kPass;
  // Tiles as equal as possible: 49 rows are better cut into 13 + 12 + 12 + 12 than into 14 + 14 +
  // 14 + 7.
  const int64_t tiles = ceil_div(count, kTileRows), rows = ceil_div(count, tiles);
  const int64_t smaller = rows * tiles - count;  // tiles with a row less
  tile.lines = Vec::kFetchesEachStep
                   ? 0
                   : ceil_div(kChunk * kPanel / kLine, tiles * ceil_div(tile.columns, kPass));
  for (tile.begin = 0; tile.begin < chunks; tile.begin = tile.end) {
    tile.end = min_of(tile.begin + slab, chunks);
    for (tile.from = 0; tile.from < tile.columns; tile.from = tile.to) {
      tile.to = min_of(tile.from + columns, tile.columns);
      const int64_t larger = tiles - smaller;
      run_rows<Product, kTileRows, kVectors>(rows, 0, larger, tile);
      if (smaller > 0) {
        run_rows<Product, kTileRows, kVectors>(rows - 1, rows * larger, smaller, tile);
      }
    }
  }
}

// The same. Where a panel has no more columns than half a tile (groups of 16 channels, say), by
// tiles of half the vectors and twice the rows: 1.2 times as fast on AVX2 for those groups, 1.5
// times from 16 to 16 channels.
template <class Product, typename T>
static void run_panel(int64_t count, Tile<T>& tile) {
  constexpr int kHalf = Vec::kVectors / 2;
  if constexpr (kHalf > 1) {
    if (tile.columns <= kHalf * Vec::kWidth)
      return run_panel_by<Product, 2 * Vec::kRows, kHalf>(count, tile);
  }
  run_panel_by<Product, Vec::kRows, Vec::kVectors>(count, tile);
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
