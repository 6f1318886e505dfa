// A job of fused Winograd: input transform, products, output transform, written once over `Vec` and
// the algorithms of winograd_points.h.
#include "cpu/winograd.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// The windows behind the job's, which the thread's next job is most likely to transform; none where
// that one has the same. A stride of 2, whose windows share little, is 1.05 to 1.09 times as fast
// so (64 to 128 channels, eight images, Zen 4; 1.08 on AVX2), a stride of 1 1.01, ResNet-18 at
// batch 32 1.015. Products of bfloat16 are too short to hide it: 0.98 to 0.99.
template <class F, class Product, typename T>
static WindowsAhead<F, T, kIntoL2> next_windows(const ConvArgs& args, const WinogradJob& job) {
  const ConvShape& s = args.shape;
  const TileCursor next(s, F::kOut, job.tile_end);
  const bool ends = job.panel_end == panels_of(s.out_channels);
  const bool any = Product::kPack == 1 && ends && exceeds_l2<T>(s);
  const int64_t left = s.batch * next.rows * next.cols - job.tile_end;
  return {args, next, any ? min_of(job.tile_end - job.tile_begin, left) : 0};
}

// sums[point] = values[point] x packed[panel][point] for every point.
template <class F, class Product, typename T>
static void multiply_points(const ConvArgs& args, int64_t count, int64_t panel, const float* values,
                            float* sums, OutputAhead<F, T>& output,
                            WindowsAhead<F, T, kIntoL2>& windows, int64_t lines) {
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
    windows.fetch(lines);
  }
}

template <class F, class Product, typename T, bool kRaw = false>
static void run_winograd(const ConvArgs& args, const WinogradJob& job, float* scratch) {
  constexpr int64_t kPoints = WinogradSizes<F>::kPoints * WinogradSizes<F>::kPoints;
  const int64_t count = job.tile_end - job.tile_begin;
  float* sums = scratch + kPoints * values_stride(args.shape, Product::kPack, count);
  if (!job.values_ready) transform_inputs<F, Product, T>(args, job, scratch);
  WindowsAhead<F, T, kIntoL2> windows = next_windows<F, Product, T>(args, job);
  const int64_t lines = ceil_div(windows.left(), kPoints * (job.panel_end - job.panel_begin));
  for (int64_t panel = job.panel_begin; panel < job.panel_end; ++panel) {
    OutputAhead<F, T> output(args, job, panel);
    if constexpr (kRaw) {
      output.fetch(count);
      multiply_raw<F>(args, count, panel, scratch, sums);
    } else {
      multiply_points<F, Product, T>(args, count, panel, scratch, sums, output, windows, lines);
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
