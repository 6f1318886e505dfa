#include "cpu/pooled_stem.h"

#include <atomic>
#include <memory>

#include "cpu/arena.h"
#include "cpu/parallel.h"

namespace resnet_fused {
namespace {

// The rows between the jobs of one call, and how many of the two jobs beside each have ended. The
// memory belongs to the calling thread and is kept.
class Edges {
 public:
  void reserve(int64_t count, int64_t row) {
    row_ = row;
    if (count > count_) {
      ended_.reset(new std::atomic<int>[static_cast<size_t>(count)]);
      count_ = count;
    }
    if (count * row > floats_) {
      rows_.reset(new float[static_cast<size_t>(count * row)]);
      floats_ = count * row;
    }
    for (int64_t i = 0; i < count; ++i) ended_[i].store(0, std::memory_order_relaxed);
  }
  float* row(int64_t edge) { return rows_.get() + edge * row_; }
  // Says that one job beside the edge has ended; whether the other one had: its writes are visible.
  bool end(int64_t edge) { return ended_[edge].fetch_add(1, std::memory_order_acq_rel) == 1; }

 private:
  std::unique_ptr<std::atomic<int>[]> ended_;
  std::unique_ptr<float[]> rows_;
  int64_t count_ = 0, floats_ = 0, row_ = 0;
};

}  // namespace

void run_pooled_stem(const ConvJobs& conv) {
  const ConvShape& shape = conv.args.shape;
  const int64_t strips = stem_strips(shape);
  const int64_t across = conv.cut.panel_jobs();  // jobs of the same strips, side by side
  static thread_local Edges kept;
  Edges& edges = kept;  // the calling thread's, in every thread
  edges.reserve(conv.count, pooled(shape.out_w()) * shape.out_channels);
  for_each_job(conv.count, [&](int64_t index) {
    const JobRange range = job_range(conv.cut, index);
    const bool above = range.row_begin % strips > 0, below = range.row_end % strips > 0;
    StemJob job{range.row_begin, range.row_end, range.panel_begin,
                range.panel_end, true,          below ? edges.row(index) : nullptr};
    conv.isa->stem_job(conv.args, job, thread_scratch(conv.cut.scratch));
    if (above && edges.end(index - across)) {
      conv.isa->stem_join(conv.args, job, edges.row(index - across));
    }
    if (below && edges.end(index)) {
      job.strip_begin = job.strip_end;
      conv.isa->stem_join(conv.args, job, edges.row(index));
    }
  });
}

}  // namespace resnet_fused
