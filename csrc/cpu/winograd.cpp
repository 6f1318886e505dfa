// Fused Winograd convolution: packing and cutting into jobs.
#include "cpu/winograd.h"

#include <algorithm>

#include "check.h"
#include "cpu/half.h"
#include "cpu/l2.h"
#include "cpu/team.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {
namespace {

// Tiles a job: three register tiles of 14 rows, so that each weight, once it has come from L3 or
// memory, serves 42 of them. Measured on ResNet-18, batch 8, 2 cores with 1 MiB of L2 each: stage 4
// takes 4.0 ms a layer at 7 tiles (whose windows fill half of L2), 3.3 at 28 and 3.1 at 42;
// stages 1 to 3 do not care, their windows stay in L2.
constexpr int64_t kMaxTiles = 42;
constexpr int64_t kMinTiles = 14;
// Weights that stay in L2 beside a job's windows need no more tiles than one register tile: at 14
// instead of 33 a block of stage 1 takes 0.86 instead of 1.00 ms within ResNet-18, one image. With
// 512 KiB of L2, where these weights do not stay, 42 tiles are 5% faster than 14.
int64_t weights_in_l2() { return l2_bytes() * 7 / 10; }
constexpr int64_t kMaxValues = 4 << 20;  // bytes of a job's transformed windows, at worst from L3
// With at least so many tiles for every thread, jobs are cut by tiles even where weights are the
// larger operand: the threads walk through the same weights side by side, and only one of them
// waits for memory. Measured on 2 cores with AVX-512 that share a 32 MiB L3, weights cold: against
// a cut by panels a layer of stage 3 went from 0.59 to 0.47 ms, of stage 4 from 0.86 to 0.74. But
// that was before threads had fixed shares of the jobs: now both cuts take the same time there
// (0.99 to 1.01 for ResNet-18 at batch 1 and 8). On 2 of Zen 3, with AVX2 and as much L3, it is the
// other way round: cut by panels up to 32 tiles a thread, ResNet-18 is 1.08 to 1.10 times as fast
// at batch 1, 1.04 at 8.
int64_t tiles_per_thread(int64_t lanes) { return lanes > 8 ? 8 : 32; }
// With fewer, weights pass through one core only, at most so many panels a job.
constexpr int64_t kPanelsPerJob = 2;
constexpr int64_t kLargeWeights = 1 << 20;  // bytes

template <class F, typename T>
void pack_as(const ConvShape& shape, const float* weight, T* packed) {
  typedef WinogradSizes<F> S;
  constexpr int64_t pack = sizeof(float) / sizeof(T);
  static constexpr WeightTransform<F> transform{};
  const auto& g = transform.value;
  const int64_t panels = panels_of(shape.out_channels);
  const int64_t words = window_words(shape, pack);
  for_each_job(panels * words, [&](int64_t index) {
    const int64_t panel = index / words, word = index % words;
    for (int64_t item = 0; item < kPanel * pack; ++item) {
      const int64_t k = panel * kPanel + item / pack, c = word * pack + item % pack;
      double half[S::kPoints][3] = {};  // G w
      if (k < shape.out_channels && c < shape.in_channels) {
        const float* w = weight + (k * shape.in_channels + c) * kKernelTaps;
        for (int i = 0; i < S::kPoints; ++i) {
          for (int x = 0; x < 3; ++x) {
            half[i][x] = g[i][0] * w[x] + g[i][1] * w[3 + x] + g[i][2] * w[6 + x];
          }
        }
      }
      for (int i = 0; i < S::kPoints; ++i) {
        for (int j = 0; j < S::kPoints; ++j) {
          const double value = half[i][0] * g[j][0] + half[i][1] * g[j][1] + half[i][2] * g[j][2];
          const int64_t matrix = (panel * S::kPoints + i) * S::kPoints + j;
          packed[(matrix * words + word) * kPanel * pack + item] =
              from_float<T>(static_cast<float>(value));
        }
      }
    }
  });
}

void pack_raw(const ConvShape& shape, const float* weight, float* packed) {
  const int64_t channels = shape.in_channels;
  for_each_job(panels_of(shape.out_channels) * channels, [&](int64_t index) {
    const int64_t panel = index / channels, c = index % channels;
    for (int64_t tap = 0; tap < kKernelTaps; ++tap) {
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        const int64_t k = panel * kPanel + lane;
        packed[(index * kKernelTaps + tap) * kPanel + lane] =
            k < shape.out_channels ? weight[(k * channels + c) * kKernelTaps + tap] : 0.0f;
      }
    }
  });
}

}  // namespace

void winograd_pack(Plan plan, const ConvShape& shape, const float* weight, void* packed) {
  float* floats = static_cast<float*>(packed);
  BFloat16* halves = static_cast<BFloat16*>(packed);
  switch (plan) {
    case Plan::kWinograd2:
      return pack_as<Winograd2>(shape, weight, floats);
    case Plan::kWinograd4:
      return pack_as<Winograd4>(shape, weight, floats);
    case Plan::kWinograd4Raw:
      return pack_raw(shape, weight, floats);
    case Plan::kWinograd5:
      return pack_as<Winograd5>(shape, weight, floats);
    case Plan::kWinograd2S2:
      return pack_as<Winograd2S2>(shape, weight, floats);
    case Plan::kWinograd4S2:
      return pack_as<Winograd4S2>(shape, weight, floats);
    case Plan::kWinograd2Bf16:
      return pack_as<Winograd2>(shape, weight, halves);
    case Plan::kWinograd2S2Bf16:
      return pack_as<Winograd2S2>(shape, weight, halves);
    default:
      fail("winograd_pack: not a Winograd plan");
  }
}

Cut winograd_cut(const ConvShape& shape, WinogradTiling tiling, int64_t pack, bool raw,
                 int64_t threads, int64_t lanes) {
  const int64_t tiles = tiling.tiles(shape);
  const int64_t points = tiling.points * tiling.points;
  Cut cut;
  cut.groups = 1;
  cut.rows = tiles;
  cut.panels = panels_of(shape.out_channels);
  cut.job_panels = cut.panels;
  const int64_t matrix_row = points * static_cast<int64_t>(sizeof(float));
  const int64_t tile_bytes = matrix_row * window_words(shape, pack);
  const int64_t weight_bytes = cut.panels * kPanel * tile_bytes;  // transformed
  const int64_t fitting = weight_bytes <= weights_in_l2()
                              ? kMinTiles
                              : std::clamp<int64_t>(kMaxValues / tile_bytes, kMinTiles, kMaxTiles);
  int64_t blocks = ceil_div(tiles, std::min(fitting, tiles));
  if (raw || (tiles < threads * tiles_per_thread(lanes) && weight_bytes > kLargeWeights)) {
    cut.job_panels = std::min(cut.panels, kPanelsPerJob);
  } else {
    // A whole number of blocks for every thread, if there are tiles enough.
    blocks = std::min(ceil_div(blocks, threads) * threads, tiles);
  }
  cut.job_rows = ceil_div(tiles, blocks);
  // A thread transforms windows for its first job of a block only, so jobs by panels cost nothing;
  // with 16 of them ResNet-18 at batch 8 is 2% faster on 2 of a machine's shared cores.
  cut.split_panels(jobs_wanted(threads));
  cut.scratch = points * (values_stride(shape, pack, cut.job_rows) + sums_stride(cut.job_rows));
  return cut;
}

}  // namespace resnet_fused
