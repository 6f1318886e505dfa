#include "cpu/pooled_stem.h"

#include <atomic>
#include <new>

#include "cpu/arena.h"

namespace resnet_fused {
namespace {

// The rows between the jobs of one call, and how many of the two jobs beside each have ended.
class Edges {
 public:
  Edges(const ConvJobs& conv, void* memory)
      : ended_(static_cast<std::atomic<int>*>(memory)),
        rows_(reinterpret_cast<float*>(static_cast<char*>(memory) + counter_bytes(conv))),
        row_(row_floats(conv)) {}

  static int64_t bytes(const ConvJobs& conv) {
    return counter_bytes(conv) +
           conv.count * row_floats(conv) * static_cast<int64_t>(sizeof(float));
  }
  static void clear(const ConvJobs& conv, void* memory) {
    std::atomic<int>* ended = static_cast<std::atomic<int>*>(memory);
    for (int64_t i = 0; i < conv.count; ++i) new (ended + i) std::atomic<int>(0);
  }
  float* row(int64_t edge) const { return rows_ + edge * row_; }
  // Says that one job beside the edge has ended; whether the other one had: its writes are visible.
  bool end(int64_t edge) const { return ended_[edge].fetch_add(1, std::memory_order_acq_rel) == 1; }

 private:
  static int64_t counter_bytes(const ConvJobs& conv) {
    return aligned(conv.count * static_cast<int64_t>(sizeof(std::atomic<int>)));
  }
  static int64_t row_floats(const ConvJobs& conv) {
    return pooled(conv.args.shape.out_w()) * conv.args.shape.out_channels;
  }

  std::atomic<int>* ended_;
  float* rows_;
  int64_t row_;
};

}  // namespace

int64_t stem_edge_bytes(const ConvJobs& conv) { return Edges::bytes(conv); }

void clear_stem_edges(const ConvJobs& conv, void* edges) { Edges::clear(conv, edges); }

void run_pooled_stem(Member& member, const ConvJobs& conv, void* memory) {
  const int64_t strips = stem_strips(conv.args.shape);
  const int64_t across = conv.cut.panel_jobs();  // jobs of the same strips, side by side
  const Edges edges(conv, memory);
  member.for_each_job(conv.count, [&](int64_t index) {
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

void run_pooled_stem(const ConvJobs& conv) {
  void* const edges = thread_arena(stem_edge_bytes(conv));
  clear_stem_edges(conv, edges);
  run_together(conv.count, thread_count(),
               [&](Member& member) { run_pooled_stem(member, conv, edges); });
}

}  // namespace resnet_fused
