// Implicit-GEMM convolution: packing and cutting into jobs.
#include "cpu/direct.h"

#include <algorithm>

#include "cpu/half.h"
#include "cpu/team.h"

namespace resnet_fused {
namespace {

// A multiple of the register tiles' rows (14, 6 or 3) is not needed: a job's rows are cut evenly.
// Measured on ResNet-18's layers: 56 to 112 rows are within 3%; 28 loses 4% in stage 4, where
// weights stream from L3.
constexpr int64_t kMinRows = 14;

template <typename T>
void pack_as(const ConvShape& shape, const float* weight, T* packed) {
  constexpr int64_t pack = sizeof(float) / sizeof(T);
  const Segments segments(shape, pack);
  const int64_t panels = panels_of(shape.group_out());
  const int64_t taps = shape.kernel_h * shape.kernel_w;
  const int64_t channels = shape.group_in();
  const int64_t size = segments.words() * kPanel * pack;  // of a segment
  for_each_job(shape.groups * panels * segments.count, [&](int64_t index) {
    const int64_t segment = index % segments.count, panel = index / segments.count % panels;
    const int64_t group = index / segments.count / panels;
    const int64_t columns = std::min(kPanel, shape.group_out() - panel * kPanel);
    const float* source = weight + (group * shape.group_out() + panel * kPanel) * channels * taps;
    T* target = packed + index * size;
    std::fill(target, target + size, T{});
    for (int64_t e = 0; e < segments.length; ++e) {
      const int64_t step = segment * segments.length + e;  // of (tap, channel)
      const float* element = source + step % channels * taps + step / channels;
      for (int64_t k = 0; k < columns; ++k) {
        target[(e / pack * kPanel + k) * pack + e % pack] =
            from_float<T>(element[k * channels * taps]);
      }
    }
  });
}

}  // namespace

Cut direct_cut(const ConvShape& shape, int64_t pack, int64_t threads) {
  const int64_t pixels = shape.out_pixels();
  const int64_t panels = panels_of(shape.group_out());

  Cut cut;
  cut.groups = shape.groups;
  cut.rows = pixels;
  cut.panels = panels;
  const Segments segments(shape, pack);
  const int64_t together = std::max<int64_t>(kMaxSlice / (segments.chunks() * kChunk), 1);
  cut.slice = ceil_div(segments.count, ceil_div(segments.count, together));  // equal slices
  for (int64_t i = 0; i < segments.count; ++i) {
    if (!segments.live(shape, i)) cut.slice = 1;  // dead slices are skipped with their weights
  }
  cut.job_rows = std::min(pixels, kMaxRows);
  cut.job_panels = panels;
  // A thread keeps rows that it gathered in one slice for its next job. Then jobs by panels cost
  // nothing, read the weights once, and may be many: on 2 of a machine's shared cores 16 jobs are 3
  // to 11% faster than 6 to 8 in layers of 14 x 14 and 7 x 7, 18% from 512 to 2048 channels, which
  // were cut by rows.
  const bool keeps_rows = cut.slice >= segments.count;
  const int64_t wanted = threads > 1 ? 3 * threads : 1;
  if (keeps_rows) cut.split_panels(jobs_wanted(threads));
  // Else with few pixels only: give each thread its own output channels, because the weights are
  // then the larger operand and are read once; the repeated gather costs 2 / (output channels of a
  // job).
  while (cut.count() < wanted && cut.job_panels > 1 &&
         pixels * cut.job_panels < 4 * shape.reduction()) {
    cut.job_panels = ceil_div(cut.job_panels, 2);
  }
  while (cut.count() < wanted && cut.job_rows > kMinRows) {
    cut.job_rows = std::max(ceil_div(cut.job_rows, 2), kMinRows);
  }
  cut.split_panels(wanted);
  // Equal jobs instead of a short last one, and as many for every thread: 7 jobs of 112 rows keep 2
  // threads as long as 8 do.
  int64_t row_jobs = cut.row_jobs();
  if (cut.count() % threads != 0 && cut.count() < jobs_wanted(threads)) {
    row_jobs = ceil_div(row_jobs, threads) * threads;
  }
  cut.job_rows = ceil_div(pixels, std::min(row_jobs, pixels));
  cut.scratch = cut.job_rows * (cut.slice * segments.chunks() * kChunk + cut.job_panels * kPanel);
  return cut;
}

void direct_pack(Plan plan, const ConvShape& shape, const float* weight, void* packed) {
  if (plan == Plan::kDirectBf16) {
    pack_as(shape, weight, static_cast<BFloat16*>(packed));
  } else {
    pack_as(shape, weight, static_cast<float*>(packed));
  }
}

}  // namespace resnet_fused
