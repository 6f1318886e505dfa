// Fused Winograd convolution: packing and cutting into jobs.
#include "cpu/winograd.h"

#include <unistd.h>

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace {

// Transformed windows may take half of L2; the other half is for sums and the weights passing
// through.
int64_t values_budget() {
  static const int64_t budget = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 512 << 10) / 2;
  return budget;
}

// More rows for each panel of weights are worth having until the multiplications hide its loads,
// two register tiles; with more, jobs only become unequal.
constexpr int64_t kMaxTiles = 28;
// A job's share of the panels where weights are the larger operand: they pass through one core
// only.
constexpr int64_t kPanelsPerJob = 2;
constexpr int64_t kLargeWeights = 1 << 20;  // bytes

}  // namespace

void winograd_pack(const ConvShape& shape, int64_t m, const float* weight, float* packed) {
  const int64_t panels = panels_of(shape.out_channels);
  const int64_t channels = shape.in_channels;
  const int points = static_cast<int>(m) + 2;
  const double (*g)[3] = m == 4 ? kWeights4 : kWeights2;
  for_each_job(panels * channels, [&](int64_t index) {
    const int64_t panel = index / channels, c = index % channels;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t k = panel * kPanel + lane;
      double half[6][3] = {};  // G w
      if (k < shape.out_channels) {
        const float* w = weight + (k * channels + c) * 9;
        for (int i = 0; i < points; ++i) {
          for (int x = 0; x < 3; ++x)
            half[i][x] = g[i][0] * w[x] + g[i][1] * w[3 + x] + g[i][2] * w[6 + x];
        }
      }
      for (int i = 0; i < points; ++i) {
        for (int j = 0; j < points; ++j) {
          const double value = half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2];
          packed[((panel * points * points + i * points + j) * channels + c) * kPanel + lane] =
              static_cast<float>(value);
        }
      }
    }
  });
}

Cut winograd_cut(const ConvShape& shape, int64_t m, int64_t threads) {
  const int64_t tiles = shape.batch * ceil_div(shape.out_h(), m) * ceil_div(shape.out_w(), m);
  Cut cut;
  cut.groups = 1;
  cut.rows = tiles;
  cut.panels = panels_of(shape.out_channels);
  cut.job_panels = cut.panels;
  const int64_t bytes_per_tile =
      winograd_points(m) * shape.in_channels * static_cast<int64_t>(sizeof(float));
  const int64_t fitting = std::clamp<int64_t>(values_budget() / bytes_per_tile, 1, kMaxTiles);
  int64_t blocks = ceil_div(tiles, std::min(fitting, tiles));
  if (blocks < 2 * threads && cut.panels * kPanel * bytes_per_tile > kLargeWeights) {
    cut.job_panels = std::min(cut.panels, kPanelsPerJob);
  } else {
    // A whole number of blocks for every thread, if there are tiles enough.
    blocks = std::min(ceil_div(blocks, threads) * threads, tiles);
  }
  cut.job_rows = ceil_div(tiles, blocks);
  cut.scratch = winograd_scratch(shape, m, cut.job_rows);
  return cut;
}

}  // namespace resnet_fused
