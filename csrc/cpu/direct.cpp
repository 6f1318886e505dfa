// Implicit-GEMM convolution: packing, cutting into jobs, the parallel loop.
#include "cpu/direct.h"

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace resnet_fused {
namespace {

// A multiple of both register tiles' rows (14 and 6) is not needed: a job's rows are cut evenly.
// Measured on ResNet-18's layers: 56 to 112 rows are within 3%; 28 loses 4% in stage 4, where
// weights stream from L3.
constexpr int64_t kMaxRows = 112;
constexpr int64_t kMinRows = 14;

}  // namespace

DirectTiles direct_tiles(const ConvShape& shape, int64_t threads) {
  const int64_t pixels = std::max<int64_t>(shape.out_pixels(), 1);
  const int64_t panels = panels_of(shape.group_out());
  const int64_t reduction = shape.reduction();
  const int64_t wanted = threads > 1 ? 3 * threads : 1;  // jobs, so that threads end together

  DirectTiles tiles;
  const Segments segments(shape);
  const int64_t together = std::max<int64_t>(kMaxSlice / (segments.chunks() * kChunk), 1);
  tiles.slice = ceil_div(segments.count, ceil_div(segments.count, together));  // equal slices
  for (int64_t i = 0; i < segments.count; ++i) {
    if (!segments.live(shape, i)) tiles.slice = 1;  // dead slices are skipped with their weights
  }
  tiles.rows = std::min(pixels, kMaxRows);
  tiles.panels = panels;
  const auto jobs = [&] {
    return shape.groups * ceil_div(pixels, tiles.rows) * ceil_div(panels, tiles.panels);
  };
  // Few pixels: give each thread its own output channels, because the weights are then the larger
  // operand and are read once; the repeated gather costs 2 / (output channels of a job).
  while (jobs() < wanted && tiles.panels > 1 && pixels * tiles.panels < 4 * reduction) {
    tiles.panels = ceil_div(tiles.panels, 2);
  }
  while (jobs() < wanted && tiles.rows > kMinRows) {
    tiles.rows = std::max(ceil_div(tiles.rows, 2), kMinRows);
  }
  while (jobs() < wanted && tiles.panels > 1) tiles.panels = ceil_div(tiles.panels, 2);
  // Equal jobs instead of a short last one.
  tiles.rows = ceil_div(pixels, ceil_div(pixels, tiles.rows));
  return tiles;
}

void direct_conv(const ConvArgs& args) {
  const ConvShape& shape = args.shape;
  const int64_t pixels = shape.out_pixels();
  if (pixels == 0 || shape.out_channels == 0) return;
  const Kernels& isa = kernels();
  const Segments segments(shape);
  const DirectTiles tiles = direct_tiles(shape, thread_count());
  const int64_t panels = panels_of(shape.group_out());
  const int64_t row_jobs = ceil_div(pixels, tiles.rows);
  const int64_t panel_jobs = ceil_div(panels, tiles.panels);
  for_each_job(shape.groups * row_jobs * panel_jobs, [&](int64_t index) {
    const int64_t rest = index / panel_jobs;
    DirectJob job;
    job.panel_begin = index % panel_jobs * tiles.panels;
    job.panel_end = std::min(job.panel_begin + tiles.panels, panels);
    job.row_begin = rest % row_jobs * tiles.rows;
    job.row_end = std::min(job.row_begin + tiles.rows, pixels);
    job.group = rest / row_jobs;
    job.slice = tiles.slice;
    isa.direct_job(args, job, thread_scratch(direct_scratch(segments, tiles)));
  });
}

void direct_pack(const ConvShape& shape, const float* weight, float* packed) {
  const int64_t panels = panels_of(shape.group_out());
  const int64_t taps = shape.kernel_h * shape.kernel_w;
  const int64_t channels = shape.group_in();
  const int64_t reduction = shape.reduction();
  for_each_job(shape.groups * panels, [&](int64_t index) {
    const int64_t group = index / panels, panel = index % panels;
    float* target = packed + index * reduction * kPanel;
    const int64_t columns = std::min(kPanel, shape.group_out() - panel * kPanel);
    const float* source = weight + (group * shape.group_out() + panel * kPanel) * channels * taps;
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int64_t c = 0; c < channels; ++c, target += kPanel) {
        const float* element = source + c * taps + tap;
        for (int64_t k = 0; k < columns; ++k) target[k] = element[k * channels * taps];
        for (int64_t k = columns; k < kPanel; ++k) target[k] = 0.0f;
      }
    }
  });
}

}  // namespace resnet_fused
