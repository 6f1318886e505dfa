// Threads: always PyTorch's own pool, so that one runtime serves the process.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

namespace resnet_fused {

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// Runs job(0) ... job(count - 1); each thread takes the next one when it is free, so unequal jobs
// and a core that another process slows down even out. A job may take a second argument: the job
// that its thread ran before in this call, or -1; the thread's scratch memory is as that one left
// it.
template <typename Job>
void for_each_job(int64_t count, const Job& job) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    int64_t previous = -1;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; previous = i) {
      if constexpr (std::is_invocable_v<Job, int64_t, int64_t>) {
        job(i, previous);
      } else {
        job(i);
      }
    }
  };
  const int64_t workers = std::min<int64_t>(count, thread_count());
  if (workers <= 1) return work();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) { work(); });
}

// Elements of a pass over memory below which a second thread costs more than it brings.
constexpr int64_t kSpanGrain = 16384;

// Runs span(begin, end) over [0, count) in one contiguous part per thread, at least `grain` long.
template <typename Span>
void for_each_span(int64_t count, int64_t grain, const Span& span) {
  if (count <= grain) {
    if (count > 0) span(0, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain,
                              [&](int64_t begin, int64_t end) { span(begin, end); });
}

}  // namespace resnet_fused
