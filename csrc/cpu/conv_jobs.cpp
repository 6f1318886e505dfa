#include "cpu/conv_jobs.h"

#include "check.h"
#include "cpu/arena.h"
#include "cpu/plan.h"

namespace resnet_fused {
namespace {

Cut cut_conv(const ConvShape& shape, const PlanInfo& plan, const Workers& workers) {
  const int64_t threads = workers.threads;
  check(plan.plan != Plan::kTorch, "ConvJobs: plan \"torch\" has no jobs");
  if (shape.out_pixels() == 0 || shape.out_channels == 0) return {};
  if (plan.plan == Plan::kStem) return stem_cut(shape, threads);
  if (!plan.is_winograd()) return direct_cut(shape, plan.pack, threads);
  return winograd_cut(shape, plan.tiling, plan.pack, plan.raw, threads, workers.isa->lanes);
}

// The set in use may have changed since the plan was checked.
const Kernels* kernels_for(const PlanInfo& plan, const Kernels* isa) {
  check(plan.pack == 1 || isa->bf16_products, "ConvJobs: plan \"", plan.name,
        "\" needs avx512_bf16, the kernels in use are ", isa->isa);
  return isa;
}

}  // namespace

ConvJobs::ConvJobs(const ConvArgs& conv, const Workers& workers)
    : args(conv),
      isa(kernels_for(plan_info(conv.plan), workers.isa)),
      cut(cut_conv(conv.shape, plan_info(conv.plan), workers)),
      count(cut.count()) {}

void ConvJobs::run(int64_t index, int64_t previous) const {
  float* scratch = thread_scratch(cut.scratch);
  const JobRange range = job_range(cut, index);
  if (plan_info(args.plan).is_winograd()) {
    const WinogradJob job{range.row_begin, range.row_end, range.panel_begin, range.panel_end,
                          same_rows(cut, index, previous)};
    isa->winograd_job(args, job, scratch);
  } else if (args.plan == Plan::kStem) {
    const StemJob job{range.row_begin, range.row_end, range.panel_begin,
                      range.panel_end, false,         nullptr};
    isa->stem_job(args, job, scratch);
  } else {
    const DirectJob job{range.row_begin,
                        range.row_end,
                        range.group,
                        range.panel_begin,
                        range.panel_end,
                        cut.slice,
                        same_rows(cut, index, previous)};
    isa->direct_job(args, job, scratch);
  }
}

void run_conv(Member& member, const ConvJobs& conv) {
  member.for_each_job(conv.count,
                      [&](int64_t index, int64_t previous) { conv.run(index, previous); });
}

void run_conv(const ConvJobs& conv) {
  run_together(conv.count, thread_count(), [&](Member& member) { run_conv(member, conv); });
}

void run_convs(Member& member, const ConvJobs& first, const ConvJobs& second) {
  member.for_each_job(first.count + second.count, [&](int64_t index, int64_t previous) {
    if (index < first.count) {
      first.run(index, previous);
    } else {
      // The last job of the first convolution means nothing to the second.
      second.run(index - first.count, previous < first.count ? -1 : previous - first.count);
    }
  });
}

}  // namespace resnet_fused
