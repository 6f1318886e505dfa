// Fused Winograd convolution: packing, cutting into jobs, the parallel loop.
#include "cpu/winograd.h"

#include <algorithm>

#include "cpu/arena.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace {

// Tiles of a block: enough rows for the register tile (14), few enough that values and sums stay in L2
// beside the weights of one point.
constexpr int64_t kBlockFloats = 96 * 1024;

WinogradTiles winograd_tiles(const ConvShape& shape, int64_t m, int64_t threads) {
  const int64_t panels = panels_of(shape.out_channels);
  const int64_t total = shape.batch * ceil_div(shape.out_h(), m) * ceil_div(shape.out_w(), m);
  const int64_t per_tile = winograd_points(m) * (shape.in_channels + shape.out_channels);
  const int64_t wanted = threads > 1 ? 3 * threads : 1;
  WinogradTiles block;
  block.panels = panels;
  block.tiles = std::clamp<int64_t>(kBlockFloats / per_tile, 8, 14);
  block.tiles = std::min(block.tiles, total);
  const auto jobs = [&] { return ceil_div(total, block.tiles) * ceil_div(panels, block.panels); };
  while (jobs() < wanted && block.panels > 2) block.panels = ceil_div(block.panels, 2);
  block.tiles = ceil_div(total, ceil_div(total, block.tiles));
  return block;
}

}  // namespace

void winograd_pack(const ConvShape& shape, int64_t m, const float* weight, float* packed) {
  const int64_t panels = panels_of(shape.out_channels);
  const int64_t channels = shape.in_channels;
  const int points = static_cast<int>(m) + 2;
  const double(*g)[3] = m == 4 ? kWeights4 : kWeights2;
  for_each_job(panels * channels, [&](int64_t index) {
    const int64_t panel = index / channels, c = index % channels;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t k = panel * kPanel + lane;
      double half[6][3] = {};  // G w
      if (k < shape.out_channels) {
        const float* w = weight + (k * channels + c) * 9;
        for (int i = 0; i < points; ++i) {
          for (int x = 0; x < 3; ++x) half[i][x] = g[i][0] * w[x] + g[i][1] * w[3 + x] + g[i][2] * w[6 + x];
        }
      }
      for (int i = 0; i < points; ++i) {
        for (int j = 0; j < points; ++j) {
          const double value = half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2];
          packed[(((i * points + j) * panels + panel) * channels + c) * kPanel + lane] =
              static_cast<float>(value);
        }
      }
    }
  });
}

void winograd_conv(const ConvArgs& args, int64_t m) {
  const ConvShape& shape = args.shape;
  const int64_t tiles = shape.batch * ceil_div(shape.out_h(), m) * ceil_div(shape.out_w(), m);
  const int64_t panels = panels_of(shape.out_channels);
  const Kernels& isa = kernels();
  const WinogradTiles block = winograd_tiles(shape, m, thread_count());
  const int64_t panel_jobs = ceil_div(panels, block.panels);
  for_each_job(ceil_div(tiles, block.tiles) * panel_jobs, [&](int64_t index) {
    WinogradJob job;
    job.tile_begin = index / panel_jobs * block.tiles;
    job.tile_end = std::min(job.tile_begin + block.tiles, tiles);
    job.panel_begin = index % panel_jobs * block.panels;
    job.panel_end = std::min(job.panel_begin + block.panels, panels);
    isa.winograd_job(args, m, job, thread_scratch(winograd_scratch(shape, m, block)));
  });
}

}  // namespace resnet_fused
