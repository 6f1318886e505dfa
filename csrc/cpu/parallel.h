// Threads: always PyTorch's own pool, so that one runtime serves the process.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <exception>

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
