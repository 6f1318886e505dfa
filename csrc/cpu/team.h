// Threads that go through one program together, in a single parallel region for all of its loops.
//
// Between two parallel regions only the calling thread is at work. In ResNet-18, whose weights push
// the code and data of everything else out of the caches, that was 14 us from one convolution to
// the next, 0.3 of the 6.1 ms that one image takes in bfloat16. In a team each thread goes on to
// the next loop by itself: 1.01 times as fast with one image, in float32 and bfloat16, 1.00 to 1.01
// with eight (2 of Zen 4; processes in turns). Fetching the next convolution's weights while it
// waits for the others gains nothing.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <type_traits>

#include "cpu/parallel.h"

namespace resnet_fused {

// What the members share. Each has a share of every loop's jobs, in a cache line of its own: the
// loop that was last begun there, and how many of its jobs were taken.
class Team {
 public:
  static constexpr int64_t kMost = 256;  // members

  explicit Team(int64_t members) : members_(members) {
    for (int64_t i = 0; i < members; ++i) lines_[i].taken.store(0, std::memory_order_relaxed);
    of_all_.fetch_add(members, std::memory_order_relaxed);
  }
  ~Team() { of_all_.fetch_sub(members_, std::memory_order_relaxed); }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t members() const { return members_; }

  // One more of the `jobs` jobs that a share has in a loop, -1 if none is left. Loops count from 1.
  // Whoever comes late, to a loop that the others have left, finds none.
  int64_t take(uint64_t loop, int64_t share, int64_t jobs) {
    std::atomic<uint64_t>& taken = lines_[share].taken;
    uint64_t seen = taken.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t begun = seen >> 32;
      const uint64_t next = begun == loop ? seen & 0xffffffff : 0;
      if (begun > loop || static_cast<int64_t>(next) >= jobs) return -1;
      if (taken.compare_exchange_weak(seen, loop << 32 | (next + 1), std::memory_order_relaxed))
        return static_cast<int64_t>(next);
    }
  }

  void finish(int64_t jobs) { finished_.fetch_add(jobs, std::memory_order_release); }

  // Returns when so many jobs have been finished since the team began, or one has failed: what they
  // wrote is visible.
  void wait_for(int64_t jobs) const {
    const int most = spins();
    for (int looks = 0; finished_.load(std::memory_order_acquire) < jobs && !failed(); ++looks) {
      if (looks < most) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

  bool failed() const { return failed_.load(std::memory_order_relaxed); }
  // Of the exceptions of all members the first is kept.
  void fail(std::exception_ptr error) {
    if (!claimed_.exchange(true)) error_ = std::move(error);
    failed_.store(true, std::memory_order_relaxed);
  }
  // Only after the parallel region.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  // How often a member looks before it lets other threads run: for 1 to 2 ms where every member of
  // every team has a core, else only briefly: it may occupy the core that the one it waits for
  // needs. Two callers of two threads each on two cores lost a quarter of their images a second to
  // that.
  static int spins() {
    static const unsigned cores = std::thread::hardware_concurrency();
    return of_all_.load(std::memory_order_relaxed) <= cores ? 1 << 16 : 1 << 6;
  }
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  struct alignas(64) Line {
    std::atomic<uint64_t> taken;
  };

  inline static std::atomic<int64_t> of_all_{0};  // members, in all teams of the process

  int64_t members_;
  alignas(64) std::atomic<int64_t> finished_{0};
  alignas(64) std::atomic<bool> failed_{false};
  std::atomic<bool> claimed_{false};
  std::exception_ptr error_;
  Line lines_[kMost];
};

// One thread's place in a team, or a thread by itself.
class Member {
 public:
  Member() = default;
  Member(Team& team, int64_t share) : team_(&team), share_(share) {}

  // Runs job(0) ... job(count - 1), and returns when all of them have ended, whichever member ran
  // them. Every member calls it for the same loops in the same order. Its share is of consecutive
  // jobs, in every call the same, so that it finds in its own cache what it wrote in the call
  // before; one that is through with its own goes on with the others' jobs, so unequal jobs and a
  // core that another process slows down even out. A job may take a second argument: the job that
  // its thread ran before in this loop, or -1; the thread's scratch memory is as that one left it.
  template <typename Job>
  void for_each_job(int64_t count, const Job& job) {
    if (team_ == nullptr) {
      for (int64_t i = 0; i < count; ++i) run(job, i, i - 1);
      return;
    }
    ++loop_;
    jobs_ += count;
    int64_t ran = 0;
    try {
      ran = run_some(count, job);
    } catch (...) {
      team_->fail(std::current_exception());
    }
    if (ran > 0) team_->finish(ran);
    team_->wait_for(jobs_);
  }

 private:
  template <typename Job>
  static void run(const Job& job, int64_t index, int64_t previous) {
    if constexpr (std::is_invocable_v<Job, int64_t, int64_t>) {
      job(index, previous);
    } else {
      job(index);
    }
  }

  template <typename Job>
  int64_t run_some(int64_t count, const Job& job) {
    const int64_t members = team_->members();
    int64_t ran = 0, previous = -1;
    for (int64_t i = 0; i < members; ++i) {
      const int64_t share = (share_ + i) % members;
      const int64_t begin = count * share / members, end = count * (share + 1) / members;
      while (!team_->failed()) {
        const int64_t taken = team_->take(loop_, share, end - begin);
        if (taken < 0) break;
        run(job, begin + taken, previous);
        previous = begin + taken;
        ++ran;
      }
    }
    return ran;
  }

  Team* team_ = nullptr;
  int64_t share_ = 0;
  uint64_t loop_ = 0;
  int64_t jobs_ = 0;  // of all loops so far
};

// Runs program(member) on up to `most` of PyTorch's threads, of which there are `threads`. Where
// fewer come, or one alone, they do everything.
template <typename Program>
void run_together(int64_t most, int64_t threads, const Program& program) {
  const int64_t members = std::min({most, threads, Team::kMost});
  if (members <= 1) {
    Member alone;
    program(alone);
    return;
  }
  Team team(members);
  parallel_spans(members, 1, [&](int64_t begin, int64_t) {
    Member member(team, begin);
    try {
      program(member);
    } catch (...) {
      team.fail(std::current_exception());
    }
  });
  team.rethrow();
}

// Runs job(0) ... job(count - 1), a program of one loop.
template <typename Job>
void for_each_job(int64_t count, const Job& job) {
  run_together(count, thread_count(), [&](Member& member) { member.for_each_job(count, job); });
}

}  // namespace resnet_fused
