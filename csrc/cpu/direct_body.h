// The implicit-GEMM kernel, written once over `Vec` and compiled once per instruction set.
//
// A job runs slice by slice over the reduction: gather the input rows of the slice, then for every
// panel and every group of Vec::kRows rows one register tile (gemm_body.h) accumulates it.
// Gathering takes 15% of the time at 64 output channels and shrinks with more: each gathered row
// serves all panels of a job. Of a map that L2 does not hold, most of that was waiting for L3,
// until a job fetched the next one's rows (rows_ahead).
#include "cpu/direct.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// The output pixels of a job in order, with the input position of each one's first tap.
struct PixelCursor : GridCursor {
  const ConvShape& shape;

  PixelCursor(const ConvShape& conv, int64_t pixel)
      : GridCursor(conv.out_h(), conv.out_w(), pixel), shape(conv) {}
  int64_t top() const { return row * shape.stride_h - shape.pad_h; }
  int64_t left() const { return col * shape.stride_w - shape.pad_w; }
};

// One segment of one row in chunks that are `step` words apart. Chunks hold 16 words: as many
// floats, converted from T, or twice as many bfloat16 as they are.
template <class Product, typename T>
struct RowCopy {
  typedef typename Product::Element Element;
  static constexpr int64_t kElements = kChunk * Product::kPack;  // of a chunk

  static inline void copy(float* target, int64_t step, const T* source, int64_t length) {
    for (; length >= kElements; length -= kElements, source += kElements, target += step) {
      for (int i = 0; i < kChunk; i += Vec::kWidth) {
        Vec::store(target + i, Product::load(source + i * Product::kPack));
      }
    }
    for (int64_t i = 0; i * Product::kPack < length; i += Vec::kWidth) {
      const int64_t rest = length - i * Product::kPack;
      Vec::store(target + i, Product::load(source + i * Product::kPack, rest));
    }
  }

  static inline void zero(float* target, int64_t step, int64_t length) {
    for (; length > 0; length -= kElements, target += step) {
      for (int i = 0; i < kChunk; i += Vec::kWidth) Vec::store(target + i, Vec::zero());
    }
  }

  // A row of taps of which only elements [begin, end) lie inside the image.
  static void copy_clipped(float* target, int64_t step, const T* source, int64_t length,
                           int64_t begin, int64_t end) {
    zero(target, step, length);
    for (int64_t i = begin; i < end; ++i) {
      Element* chunk = reinterpret_cast<Element*>(target + i / kElements * step);
      chunk[i % kElements] = Product::element(source[i]);
    }
  }
};

// Gathers segments [begin, end) of the job's rows.
template <class Product, typename T>
static void gather(const ConvArgs& args, const Segments& segments, const DirectJob& job,
                   int64_t begin, int64_t end, float* rows) {
  typedef RowCopy<Product, T> Row;
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
          Row::copy(target, step, source, length);
        } else if (row_inside) {
          Row::copy_clipped(target, step, source, length, lo, hi);
        } else {
          Row::zero(target, step, length);
        }
      } else if (row_inside && ix >= 0 && ix < s.in_w) {
        Row::copy(target, step, source, length);
      } else {
        Row::zero(target, step, length);
      }
      if (++kx == taps) {
        kx = 0;
        ++ky;
      }
    }
  }
}

// The rows behind the job's, which the thread's next job is most likely to gather. None where that
// one has the same rows, and of larger kernels, whose taps read them from the cache again and
// again. On Zen 4, eight images of 56 x 56: 256 to 64 channels 1.13 times as fast, 1.12 on AVX2, 64
// to 256 1.05 (AVX2 1.00), ResNet-50 as a whole 1.02.
template <typename T>
static RowsAhead rows_ahead(const ConvArgs& args, const DirectJob& job,
                            const void* (&rows)[kMaxRows]) {
  const ConvShape& s = args.shape;
  RowsAhead ahead;
  if (s.kernel_h * s.kernel_w > 1 || s.pad_h > 0 || s.pad_w > 0) return ahead;
  if (job.panel_end < panels_of(s.group_out()) || !exceeds_l2<T>(s)) return ahead;
  const int64_t count = job.row_end - job.row_begin;
  const T* x = static_cast<const T*>(args.x) + job.group * s.group_in();
  ahead.count = min_of(count, s.out_pixels() - job.row_end);
  PixelCursor pixel(s, job.row_end);
  for (int64_t r = 0; r < ahead.count; ++r, pixel.next()) {
    rows[r] = x + ((pixel.image * s.in_h + pixel.top()) * s.in_w + pixel.left()) * s.in_channels;
  }
  ahead.rows = rows;
  ahead.lines = ceil_div(s.group_in() * static_cast<int64_t>(sizeof(T)), 64);
  const int64_t tiles = ceil_div(count, Vec::kRows) * (job.panel_end - job.panel_begin);
  ahead.each = ceil_div(ahead.count * ahead.lines, tiles * ceil_div(s.group_in(), kChunk));
  return ahead;
}

template <class Product, typename T>
static void run_direct(const ConvArgs& args, const DirectJob& job, float* scratch) {
  const ConvShape& s = args.shape;
  const Segments segments(s, Product::kPack);
  const int64_t count = job.row_end - job.row_begin;
  const int64_t panels = panels_of(s.group_out());
  float* rows = scratch;
  float* partial = scratch + count * job.slice * segments.chunks() * kChunk;
  const bool ready = job.rows_ready && job.slice >= segments.count;  // gathered in one slice
  // Slices of one segment may be dead; if all are, the last one, gathered as zeros, still runs.
  int64_t last_live = segments.count - 1;
  while (job.slice == 1 && last_live > 0 && !segments.live(s, last_live)) --last_live;
  const void* next_rows[kMaxRows];
  RowsAhead ahead = rows_ahead<T>(args, job, next_rows);
  bool first = true;
  for (int64_t begin = 0; begin <= last_live; begin += job.slice) {
    if (job.slice == 1 && begin < last_live && !segments.live(s, begin)) continue;
    const int64_t end = min_of(begin + job.slice, segments.count);
    if (!ready) gather<Product, T>(args, segments, job, begin, end, rows);
    const auto weights = [&](int64_t panel, int64_t segment) {
      return args.packed +
             ((job.group * panels + panel) * segments.count + segment) * segments.words() * kPanel;
    };
    for (int64_t p = job.panel_begin; p < job.panel_end; ++p) {
      const int64_t channel = job.group * s.group_out() + p * kPanel;
      const int64_t offset = job.row_begin * s.out_channels + channel;
      Tile<T> tile;
      tile.rows = rows;
      tile.chunk_step = count * kChunk;
      tile.panel = weights(p, begin);
      // The thread's next job is most likely the one with the next panels.
      tile.next = p + 1 < job.panel_end  ? weights(p + 1, begin)
                  : end < segments.count ? weights(job.panel_begin, end)
                                         : weights(job.panel_end, 0);
      tile.segments = end - begin;
      tile.length = segments.words();
      tile.partial = partial + (p - job.panel_begin) * count * kPanel;
      tile.first = first;
      tile.last = end > last_live;
      tile.columns = min_of(kPanel, s.group_out() - p * kPanel);
      tile.scale = args.scale + channel;
      tile.shift = args.shift + channel;
      tile.residual = args.residual ? static_cast<const T*>(args.residual) + offset : nullptr;
      tile.y = static_cast<T*>(args.y) + offset;
      tile.y_stride = s.out_channels;
      tile.low = args.relu ? 0.0f : -__builtin_inff();
      tile.ahead = ahead.count > 0 ? &ahead : nullptr;
      run_panel<Product, T>(count, tile);
    }
    first = false;
  }
}

static void direct_job(const ConvArgs& args, const DirectJob& job, float* scratch) {
  switch (args.dtype) {
    case DType::kFloat32:
      return run_direct<FloatProduct, float>(args, job, scratch);
    case DType::kBFloat16:
#ifdef RESNET_FUSED_BF16_PRODUCTS
      if (args.plan == Plan::kDirectBf16)
        return run_direct<Bf16Product, BFloat16>(args, job, scratch);
#endif
      return run_direct<FloatProduct, BFloat16>(args, job, scratch);
    case DType::kFloat16:
      return run_direct<FloatProduct, Float16>(args, job, scratch);
    case DType::kFloat64:
      return;  // never planned: double runs on PyTorch's convolution
  }
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
