// Threads: always PyTorch's own pool, so that one runtime serves the process.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace resnet_fused {

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// What starts and ends a parallel loop, told to ThreadSanitizer: it cannot see it itself, because
// the OpenMP runtime is not compiled for it. Nothing is said of threads among each other.
class ForkJoin {
 public:
#ifdef __SANITIZE_THREAD__
  void fork() { __tsan_release(&forked_); }
  void enter() { __tsan_acquire(&forked_); }
  void leave() { __tsan_release(&left_); }
  void join() { __tsan_acquire(&left_); }

 private:
  char forked_ = 0, left_ = 0;
#else
  void fork() {}
  void enter() {}
  void leave() {}
  void join() {}
#endif
};

// PyTorch's parallel_for, which runs span(begin, end) over parts of [0, count) that are at least
// `grain` long. Of the exceptions that spans throw the first arrives at the caller, once all spans
// have ended; through PyTorch's C interface it would lose its sentence.
template <typename Span>
void parallel_spans(int64_t count, int64_t grain, const Span& span) {
  ForkJoin order;
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  // Not looked into by ThreadSanitizer: this reads its captures before it can tell of the start.
  const auto part = [&](int64_t begin, int64_t end) __attribute__((no_sanitize("thread"))) {
    order.enter();
    try {
      span(begin, end);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
    order.leave();
  };
  order.fork();
  torch::stable::parallel_for(0, count, grain, part);
  order.join();
  if (error) std::rethrow_exception(error);
}

// Jobs [0, count) in equal shares, each with a counter of its own in a cache line of its own.
class Shares {
 public:
  static constexpr int64_t kMost = 256;  // threads beyond get no jobs

  Shares(int64_t count, int64_t shares) : count_(count), shares_(shares) {
    for (int64_t i = 0; i < shares; ++i) lines_[i].next.store(begin(i), std::memory_order_relaxed);
  }
  // The next job of a share, -1 if none is left.
  int64_t take(int64_t share) {
    const int64_t index = lines_[share].next.fetch_add(1, std::memory_order_relaxed);
    return index < begin(share + 1) ? index : -1;
  }

 private:
  struct alignas(64) Line {
    std::atomic<int64_t> next;
  };
  int64_t begin(int64_t share) const { return count_ * share / shares_; }

  int64_t count_, shares_;
  Line lines_[kMost];
};

// Runs job(0) ... job(count - 1). Each thread has a share of consecutive jobs, in every call the
// same, so that it finds in its own cache what it wrote in the call before; one that is through
// with its own goes on with the others' jobs, so unequal jobs and a core that another process slows
// down even out. A job may take a second argument: the job that its thread ran before in this call,
// or -1; the thread's scratch memory is as that one left it.
template <typename Job>
void for_each_job(int64_t count, const Job& job) {
  const auto run = [&](int64_t index, int64_t previous) {
    if constexpr (std::is_invocable_v<Job, int64_t, int64_t>) {
      job(index, previous);
    } else {
      job(index);
    }
  };
  const int64_t workers = std::min({count, thread_count(), Shares::kMost});
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) run(i, i - 1);
    return;
  }
  Shares shares(count, workers);
  parallel_spans(workers, 1, [&](int64_t begin, int64_t) {
    int64_t previous = -1;
    for (int64_t i = 0; i < workers; ++i) {
      const int64_t share = (begin + i) % workers;
      for (int64_t index; (index = shares.take(share)) >= 0; previous = index) run(index, previous);
    }
  });
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
  parallel_spans(count, grain, span);
}

}  // namespace resnet_fused
