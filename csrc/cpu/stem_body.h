// The kernel of the stem, written once over `Vec`: transform rows, multiply, transform back, pool.
#include "cpu/pool.h"
#include "cpu/stem.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// B^T of the points 0, +-1, +-1/2 and infinity. A point's row holds the coefficients of the product
// of (x - q) over the other finite points q, that of infinity over all of them; here a factor is a
// difference of values, and x alone a shift:
//   0: (x^2 - 1)(x^2 - 1/4)         infinity: x (x^2 - 1)(x^2 - 1/4)
//   +-1: x (x +- 1)(x^2 - 1/4)      +-1/2: x (x +- 1/2)(x^2 - 1)
static inline __attribute__((always_inline)) void stem_shared_points(const Reg (&x)[6],
                                                                     Reg (&t)[6]) {
  const Reg half = Vec::set1(0.5f), quarter = Vec::set1(0.25f), sum = Vec::set1(1.25f);
  const Reg low_1 = Vec::fnma(quarter, x[1], x[3]), high_1 = Vec::fnma(quarter, x[2], x[4]);
  const Reg low_half = Vec::sub(x[3], x[1]), high_half = Vec::sub(x[4], x[2]);
  t[0] = Vec::fma(quarter, x[0], Vec::fnma(sum, x[2], x[4]));
  t[1] = Vec::add(high_1, low_1);
  t[2] = Vec::sub(high_1, low_1);
  t[3] = Vec::fma(half, low_half, high_half);
  t[4] = Vec::fnma(half, low_half, high_half);
  t[5] = Vec::fma(quarter, x[1], Vec::fnma(sum, x[3], x[5]));
}

// All of a strip's input rows to its transformed rows, in the order of kStemPoint.
static inline __attribute__((always_inline)) void stem_input(const Reg (&x)[kStemRows],
                                                             Reg (&t)[kStemRows]) {
  Reg even[6], odd[6], from_even[6], from_odd[6];
  const Reg two = Vec::set1(2.0f);
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    even[i] = Vec::fnma(two, x[2 * i], x[2 * i + 2]);  // the factor (x - 2)
    odd[i] = x[2 * i + 1];
  }
  stem_shared_points(even, from_even);
  stem_shared_points(odd, from_odd);
#pragma GCC unroll 6
  for (int p = 0; p < kStemShared; ++p) {
    t[2 * p] = from_even[p];
    t[2 * p + 1] = from_odd[p];
  }
  // The point 2: x (x^2 - 1)(x^2 - 1/4) of the even rows themselves.
  t[12] = Vec::fma(Vec::set1(0.25f), x[2], Vec::fnma(Vec::set1(1.25f), x[6], x[10]));
}

// A^T: row i holds the points to the power of i, infinity counts in the last row only.
static inline __attribute__((always_inline)) void stem_output(const Reg (&m)[kStemPoints],
                                                              Reg (&y)[kStemOut]) {
  const Reg sum_1 = Vec::add(m[1], m[2]), difference_1 = Vec::sub(m[1], m[2]);
  const Reg sum_half = Vec::add(m[3], m[4]), difference_half = Vec::sub(m[3], m[4]);
  y[0] = Vec::add(Vec::add(m[0], sum_1), Vec::add(sum_half, m[6]));
  y[1] = Vec::fma(Vec::set1(2.0f), m[6], Vec::fma(Vec::set1(0.5f), difference_half, difference_1));
  y[2] = Vec::fma(Vec::set1(4.0f), m[6], Vec::fma(Vec::set1(0.25f), sum_half, sum_1));
  y[3] = Vec::add(
      Vec::fma(Vec::set1(8.0f), m[6], Vec::fma(Vec::set1(0.125f), difference_half, difference_1)),
      m[5]);
}

static void stem_zero_padding(const ConvShape& s, const StemScratch& at, float* rows) {
  const int64_t begin = at.lead + s.pad_w * s.in_channels;
  const int64_t end = begin + s.in_w * s.in_channels;
  for (int64_t t = 0; t < kStemRows; ++t) {
    float* row = rows + t * at.stride;
    for (int64_t i = 0; i < begin; ++i) row[i] = 0.0f;
    for (int64_t i = end; i < at.stride; ++i) row[i] = 0.0f;
  }
}

template <typename T>
static void stem_transform_rows(const ConvArgs& args, int64_t image, int64_t strip,
                                const StemScratch& at, float* rows) {
  const ConvShape& s = args.shape;
  const int64_t length = s.in_w * s.in_channels;
  const int64_t top = strip * kStemOut * kStemStride - s.pad_h;
  const T* x = static_cast<const T*>(args.x) + image * s.in_h * length;
  const T* source[kStemRows];  // null outside the image
  for (int64_t i = 0; i < kStemRows; ++i) {
    source[i] = top + i >= 0 && top + i < s.in_h ? x + (top + i) * length : nullptr;
  }
  float* target = rows + at.lead + s.pad_w * s.in_channels;
  for (int64_t c = 0; c < length; c += Vec::kWidth) {
    const int64_t lanes = length - c;
    Reg values[kStemRows], transformed[kStemRows];
#pragma GCC unroll 13
    for (int i = 0; i < kStemRows; ++i) {
      values[i] = source[i] ? load_lanes(source[i] + c, lanes) : Vec::zero();
    }
    stem_input(values, transformed);
#pragma GCC unroll 13
    for (int t = 0; t < kStemRows; ++t) Vec::store(target + t * at.stride + c, transformed[t]);
  }
}

// One register tile of one point: output pixels side by side, by one panel. `rows` is one
// transformed row, or the even one with the odd one `row_stride` behind it.
struct StemTile {
  const float* rows;
  int64_t row_stride;
  int64_t row_count;
  int64_t step;        // floats between the windows of adjacent output pixels
  int64_t reduction;   // floats of a window
  const float* panel;  // [row][reduction][32]
  int64_t columns;     // output channels in this panel, at most 32
  float* sums;         // [output pixel][32]
};

// Longer sums are cut into blocks, as in gemm_body.h: at 64 channels the error falls from 2.1e-6 to
// 8.6e-7. With few channels all of a point is one block.
constexpr int64_t kStemBlock = kBlockChunks * kChunk;

template <int kCols>
static __attribute__((noinline)) void run_stem_tile(const StemTile& tile) {
  const int64_t step = tile.step;
  for (int col = 0; col < tile.columns; col += Vec::kVectors * Vec::kWidth) {
    Sums<kCols> sum;
    clear(sum);
    float* sums = tile.sums + col;
    const float* panel = tile.panel + col;
    bool first = true;
    int64_t summed = 0;  // terms of this block
    for (int64_t row = 0; row < tile.row_count; ++row) {
      const float* window = tile.rows + row * tile.row_stride;
      for (int64_t left = tile.reduction; left > 0;) {
        if (summed >= kStemBlock) {
          add_partial(sums, first, sum);
          store_partial(sums, sum);
          clear(sum);
          first = false;
          summed = 0;
        }
        const int64_t terms = min_of(left, kStemBlock);
        left -= terms;
        summed += terms;
        multiply_steps<FloatProduct, false>(window, step, panel, terms, sum);
        window += terms;
        panel += terms * kPanel;
      }
    }
    add_partial(sums, first, sum);
    store_partial(sums, sum);
  }
}

template <int kCols = Vec::kRows>
static void run_stem_cols(int64_t cols, const StemTile& tile) {
  if (cols == kCols) {
    run_stem_tile<kCols>(tile);
  } else if constexpr (kCols > 1) {
    run_stem_cols<kCols - 1>(cols, tile);
  }
}

// A block of output pixels of one strip: up to Vec::kRows columns, 4 rows, the channels of a panel.
struct StemBlock {
  int64_t image, strip;
  int64_t begin, end;  // columns
  int64_t panel;
};

static constexpr int64_t kStemSums = Vec::kRows * kPanel;  // between points
static_assert(Vec::kRows <= kStemMaxCols, "the scratch memory has room for kStemMaxCols");

static void stem_multiply(const ConvArgs& args, const StemBlock& block, const StemScratch& at,
                          const float* rows, float* sums) {
  const ConvShape& s = args.shape;
  StemTile tile;
  tile.row_stride = at.stride;
  tile.step = s.stride_w * s.in_channels;
  tile.reduction = stem_reduction(s);
  tile.columns = min_of(kPanel, s.out_channels - block.panel * kPanel);
  for (int64_t p = 0; p < kStemPoints; ++p) {
    tile.rows = rows + 2 * p * at.stride + at.lead + block.begin * tile.step;
    tile.row_count = p < kStemShared ? 2 : 1;
    tile.panel = args.packed + (block.panel * kStemRows + 2 * p) * tile.reduction * kPanel;
    tile.sums = sums + p * kStemSums;
    run_stem_cols(block.end - block.begin, tile);
  }
}

// Four rows of output in one column, before the activation; rows below the image are minus infinity
// (they are not stored, and a maximum passes over them).
template <typename T>
static inline __attribute__((always_inline)) void stem_column(const ConvArgs& args,
                                                              const float* sums, int64_t rows,
                                                              int64_t at, int64_t row_step,
                                                              Reg scale, Reg shift, int64_t lanes,
                                                              Reg (&y)[kStemOut]) {
  Reg m[kStemPoints];
#pragma GCC unroll 7
  for (int p = 0; p < kStemPoints; ++p) m[p] = Vec::load(sums + p * kStemSums);
  stem_output(m, y);
#pragma GCC unroll 4
  for (int i = 0; i < kStemOut; ++i) {
    if (i >= rows) {
      y[i] = Vec::set1(-__builtin_inff());
      continue;
    }
    y[i] = Vec::fma(y[i], scale, shift);
    if (args.residual) {
      const T* residual = static_cast<const T*>(args.residual) + at + i * row_step;
      y[i] = Vec::add(y[i], Vec::load(residual, lanes));
    }
  }
}

template <typename T>
static void stem_write(const ConvArgs& args, const StemBlock& block, const float* sums) {
  const ConvShape& s = args.shape;
  const int64_t top = block.strip * kStemOut;
  const int64_t rows = min_of(kStemOut, s.out_h() - top);
  const int64_t row_step = s.out_w() * s.out_channels;
  const Reg low = Vec::set1(args.relu ? 0.0f : -__builtin_inff());
  const int64_t first = (block.image * s.out_h() + top) * row_step;
  for (int64_t col = 0; col < kPanel; col += Vec::kWidth) {
    const int64_t c = block.panel * kPanel + col;
    const int64_t lanes = min_of(s.out_channels - c, Vec::kWidth);
    if (lanes <= 0) break;
    const Reg scale = Vec::load(args.scale + c, lanes), shift = Vec::load(args.shift + c, lanes);
    for (int64_t x = block.begin; x < block.end; ++x) {
      const int64_t at = first + x * s.out_channels + c;
      Reg y[kStemOut];
      stem_column<T>(args, sums + (x - block.begin) * kPanel + col, rows, at, row_step, scale,
                     shift, lanes, y);
#pragma GCC unroll 4
      for (int i = 0; i < kStemOut; ++i) {
        if (i >= rows) break;
        store_lanes(static_cast<T*>(args.y) + at + i * row_step, Vec::at_least(y[i], low), lanes);
      }
    }
  }
}

// What a strip hands down, each [pooled column][out_channels]; null where there is nothing.
struct StemCarry {
  const float* above;  // the last row of the strip above, pooled along the columns
  float* below;        // the same of this strip
};

// Maxima of a pooled column so far, kept from block to block: [vector of the panel][3 rows][lane].
typedef float StemTail[3][kPanel];

template <typename T>
static void stem_write_pooled(const ConvArgs& args, const StemBlock& block, const float* sums,
                              const StemCarry& carry, StemTail& tail) {
  const ConvShape& s = args.shape;
  const int64_t out_h = s.out_h(), out_w = s.out_w();
  const int64_t top = block.strip * kStemOut;
  const int64_t rows = min_of(kStemOut, out_h - top);
  const int64_t row_step = out_w * s.out_channels, pooled_step = pooled(out_w) * s.out_channels;
  const Reg low = Vec::set1(args.relu ? 0.0f : -__builtin_inff());
  const int64_t first = (block.image * out_h + top) * row_step;
  T* target = static_cast<T*>(args.y) + (block.image * pooled(out_h) + top / 2) * pooled_step;
  for (int64_t col = 0; col < kPanel; col += Vec::kWidth) {
    const int64_t c = block.panel * kPanel + col;
    const int64_t lanes = min_of(s.out_channels - c, Vec::kWidth);
    if (lanes <= 0) break;
    const Reg scale = Vec::load(args.scale + c, lanes), shift = Vec::load(args.shift + c, lanes);
    Reg upper = Vec::load(tail[0] + col), lower = Vec::load(tail[1] + col);
    Reg last = Vec::load(tail[2] + col);
    for (int64_t x = block.begin; x < block.end; ++x) {
      Reg y[kStemOut];
      stem_column<T>(args, sums + (x - block.begin) * kPanel + col, rows,
                     first + x * s.out_channels + c, row_step, scale, shift, lanes, y);
      const Reg two = Vec::max(y[0], y[1]), three = Vec::max(Vec::max(y[1], y[2]), y[3]);
      upper = Vec::max(upper, two);
      lower = Vec::max(lower, three);
      last = Vec::max(last, y[3]);
      if (x % 2 == 0 && x + 1 < out_w) continue;
      const int64_t at = x / 2 * s.out_channels + c;
      if (carry.above) upper = Vec::max(upper, Vec::load(carry.above + at, lanes));
      store_lanes(target + at, Vec::at_least(upper, low), lanes);
      if (rows > 2) store_lanes(target + pooled_step + at, Vec::at_least(lower, low), lanes);
      if (carry.below) store_lanes(carry.below + at, last, lanes);
      upper = two, lower = three, last = y[3];  // the next window begins in this column
    }
    Vec::store(tail[0] + col, upper);
    Vec::store(tail[1] + col, lower);
    Vec::store(tail[2] + col, last);
  }
}

template <typename T>
static void run_stem(const ConvArgs& args, const StemJob& job, float* rows) {
  const ConvShape& s = args.shape;
  const StemScratch at(s);
  float* sums = rows + at.sums;
  const int64_t strips = stem_strips(s);
  const int64_t out_w = s.out_w(), blocks = ceil_div(out_w, Vec::kRows);
  stem_zero_padding(s, at, rows);
  for (int64_t index = job.strip_begin; index < job.strip_end; ++index) {
    const int64_t image = index / strips, strip = index % strips;
    stem_transform_rows<T>(args, image, strip, at, rows);
    StemCarry carry{nullptr, nullptr};
    if (index > job.strip_begin && strip > 0) carry.above = rows + at.carry;
    if (strip + 1 < strips) {
      carry.below = index + 1 < job.strip_end ? rows + at.carry : job.edge;
    }
    for (int64_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
      StemTail tail;
      for (int64_t i = 0; i < kPanel; ++i) tail[0][i] = tail[1][i] = tail[2][i] = -__builtin_inff();
      StemBlock block{image, strip, 0, 0, panel};
      for (int64_t b = 0; b < blocks; ++b, block.begin = block.end) {
        block.end = block.begin + ceil_div(out_w - block.begin, blocks - b);
        stem_multiply(args, block, at, rows, sums);
        if (job.pool) {
          stem_write_pooled<T>(args, block, sums, carry, tail);
        } else {
          stem_write<T>(args, block, sums);
        }
      }
    }
  }
}

static void stem_job(const ConvArgs& args, const StemJob& job, float* scratch) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_stem<float>(args, job, scratch);
    case DType::kBFloat16:
      return run_stem<BFloat16>(args, job, scratch);
    case DType::kFloat16:
      return run_stem<Float16>(args, job, scratch);
    case DType::kFloat64:
      return;  // never planned: double runs on PyTorch's convolution
  }
}

template <typename T>
static void join_stem(const ConvArgs& args, const StemJob& job, const float* edge) {
  const ConvShape& s = args.shape;
  const int64_t begin = job.panel_begin * kPanel;
  const int64_t end = min_of(job.panel_end * kPanel, s.out_channels);
  const int64_t width = pooled(s.out_w());
  const int64_t image = job.strip_begin / stem_strips(s), strip = job.strip_begin % stem_strips(s);
  const int64_t row = image * pooled(s.out_h()) + strip * (kStemOut / 2);
  const Reg low = Vec::set1(args.relu ? 0.0f : -__builtin_inff());
  T* y = static_cast<T*>(args.y) + row * width * s.out_channels;
  for (int64_t x = 0; x < width; ++x, y += s.out_channels, edge += s.out_channels) {
    for (int64_t c = begin; c < end; c += Vec::kWidth) {
      const int64_t lanes = end - c;
      const Reg larger = Vec::max(Vec::load(y + c, lanes), Vec::load(edge + c, lanes));
      store_lanes(y + c, Vec::at_least(larger, low), lanes);
    }
  }
}

// The first pooled row of a job that has run, joined with the edge of the job above.
static void stem_join(const ConvArgs& args, const StemJob& job, const float* edge) {
  switch (args.dtype) {
    case DType::kFloat32:
      return join_stem<float>(args, job, edge);
    case DType::kBFloat16:
      return join_stem<BFloat16>(args, job, edge);
    case DType::kFloat16:
      return join_stem<Float16>(args, job, edge);
    case DType::kFloat64:
      return;
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
