// The stem: cutting into jobs and packing.
#include "cpu/stem.h"

#include <algorithm>
#include <iterator>

#include "cpu/team.h"

namespace resnet_fused {
namespace {

// Jobs for each thread, at least, where strips suffice: they even out what disturbs one core.
constexpr int64_t kRounds = 3;
// What a job costs beside its strips, in strips: the row between two pooled jobs, 14 KB for 39 us
// of work, goes through memory.
constexpr double kJobCost = 0.03;

// G of one transformed row: its factor for each kernel row. A point's row of G is its powers over
// the product of its distances to the other finite points.
void stem_weights(int64_t row, double (&tap)[kStemKernel]) {
  const int64_t point = row / 2, odd = row % 2;  // row 12 is the even one of the point 2
  const int64_t taps = odd ? 3 : 4;
  std::fill(std::begin(tap), std::end(tap), 0.0);
  if (point == kStemInfinity) {
    tap[odd + 2 * (taps - 1)] = 1;
    return;
  }
  double value = 1;
  for (int64_t q = 0; q < (odd ? kStemShared : kStemPoints); ++q) {
    if (q != point && q != kStemInfinity) value /= kStemPoint[point] - kStemPoint[q];
  }
  for (int64_t j = 0; j < taps; ++j, value *= kStemPoint[point]) tap[odd + 2 * j] = value;
}

}  // namespace

Cut stem_cut(const ConvShape& shape, int64_t threads) {
  const int64_t strips = stem_strips(shape);
  Cut cut;
  cut.groups = 1;
  cut.rows = shape.batch * strips;
  cut.panels = panels_of(shape.out_channels);
  cut.job_panels = cut.panels;
  cut.job_rows = strips;
  cut.scratch = StemScratch(shape).total;
  if (threads == 1) return cut;
  const auto rounds = [&](int64_t size) { return ceil_div(ceil_div(cut.rows, size), threads); };
  double least = 0;
  for (int64_t size = strips; size >= 1; --size) {
    const int64_t count = rounds(size);
    if (count < kRounds && size > 1) continue;
    const double cost = static_cast<double>(count) * (static_cast<double>(size) + kJobCost);
    if (least != 0 && cost >= least) continue;
    least = cost;
    cut.job_rows = size;
  }
  // Few strips: each thread transforms the rows again for its own output channels.
  cut.split_panels(kRounds * threads);
  return cut;
}

void stem_pack(const ConvShape& shape, const float* weight, float* packed) {
  const int64_t panels = panels_of(shape.out_channels);
  const int64_t channels = shape.in_channels, width = shape.kernel_w;
  const int64_t reduction = stem_reduction(shape);
  for_each_job(panels * kStemRows, [&](int64_t index) {
    const int64_t panel = index / kStemRows, row = index % kStemRows;
    double tap[kStemKernel];
    stem_weights(row, tap);
    float* target = packed + index * reduction * kPanel;
    for (int64_t kx = 0; kx < width; ++kx) {
      for (int64_t c = 0; c < channels; ++c, target += kPanel) {
        for (int64_t lane = 0; lane < kPanel; ++lane) {
          const int64_t k = panel * kPanel + lane;
          double sum = 0;
          for (int64_t ky = 0; ky < kStemKernel && k < shape.out_channels; ++ky) {
            sum += tap[ky] * weight[((k * channels + c) * kStemKernel + ky) * width + kx];
          }
          target[lane] = static_cast<float>(sum);
        }
      }
    }
  });
}

}  // namespace resnet_fused
