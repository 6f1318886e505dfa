#include "cpu/conv_jobs.h"

#include "cpu/arena.h"
#include "cpu/parallel.h"

namespace resnet_fused {
namespace {

Cut cut_conv(const ConvShape& shape, Plan plan, int64_t threads) {
  if (shape.out_pixels() == 0 || shape.out_channels == 0) return {};
  switch (plan) {
    case Plan::kDirect:
      return direct_cut(shape, threads);
    case Plan::kWinograd4:
    case Plan::kWinograd2:
      return winograd_cut(shape, winograd_tile(plan), threads);
    case Plan::kTorch:
      break;
  }
  fail("ConvJobs: plan \"torch\" has no jobs");
}

}  // namespace

ConvJobs::ConvJobs(const ConvArgs& conv, Plan chosen, int64_t threads)
    : args(conv),
      plan(chosen),
      isa(&kernels()),
      cut(cut_conv(conv.shape, chosen, threads)),
      count(cut.count()) {}

void ConvJobs::run(int64_t index, int64_t previous) const {
  float* scratch = thread_scratch(cut.scratch);
  const JobRange range = job_range(cut, index);
  switch (plan) {
    case Plan::kDirect: {
      const DirectJob job{range.row_begin,   range.row_end,   range.group,
                          range.panel_begin, range.panel_end, cut.slice};
      return isa->direct_job(args, job, scratch);
    }
    case Plan::kWinograd4:
    case Plan::kWinograd2: {
      const WinogradJob job{range.row_begin, range.row_end, range.panel_begin, range.panel_end,
                            same_rows(cut, index, previous)};
      return isa->winograd_job(args, winograd_tile(plan), job, scratch);
    }
    case Plan::kTorch:
      return;  // refused by the constructor
  }
}

void run_conv(const ConvJobs& conv) {
  for_each_job(conv.count, [&](int64_t index, int64_t previous) { conv.run(index, previous); });
}

void run_convs(const ConvJobs& first, const ConvJobs& second) {
  for_each_job(first.count + second.count, [&](int64_t index, int64_t previous) {
    if (index < first.count) {
      first.run(index, previous);
    } else {
      // The last job of the first convolution means nothing to the second.
      second.run(index - first.count, previous < first.count ? -1 : previous - first.count);
    }
  });
}

}  // namespace resnet_fused
