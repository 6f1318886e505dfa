// Whether a launch may load weights before the kernel ahead of it in the stream has ended.
//
// With programmatic dependent launch a kernel may start when the blocks of the one before have
// ended or let it, and then what that one wrote need not be visible. Whatever is read behind
// griddepcontrol.wait is safe, so that any launch may overlap. Weights may only be read ahead of it
// where the kernel before is known not to have written them. Of a stream that runs nothing is
// known: PyTorch may have copied or packed them just then, into memory that held others a moment
// ago.
//
// While a graph is captured the stream tells on which nodes its next one will depend. If that is a
// single one, and the node of a launch of ours, then in every replay that launch is the kernel
// before. It lets the next one start only when all before it had ended (conv_kernel.cuh), so that
// nothing but its own output can be under way.
#pragma once

#include <cstdint>
#include <mutex>

#include "cuda/stream_end.h"

namespace resnet_fused::sm90 {

struct Range {  // of addresses
  uintptr_t begin, end;
};
inline Range range_of(const void* at, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(at);
  return {begin, begin + bytes};
}
inline bool apart(const Range& a, const Range& b) { return a.end <= b.begin || b.end <= a.begin; }

using cuda::StreamEnd;

struct Overlap {
  bool launch, weights;  // whether the launch may overlap, and load its weights early
};

// Launches that were captured, as many as there are slots; one that was forgotten overlaps nothing.
class CapturedLaunches {
 public:
  // Of a launch behind `end`.
  Overlap allowed(const StreamEnd& end, const Range& weights, const Range& shortcut) {
    if (end.runs) return {true, false};
    if (!end.node) return {false, false};
    const std::lock_guard<std::mutex> lock(mutex_);
    const Launch& before = slot(end);
    if (before.capture != end.capture || before.node != end.node) return {false, false};
    return {true, apart(before.output, weights) && apart(before.output, shortcut)};
  }
  // `end`: where the stream is now, behind a launch that writes `output`.
  void add(const StreamEnd& end, const Range& output) {
    if (end.runs || !end.node) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    slot(end) = {end.capture, end.node, output};
  }

 private:
  struct Launch {
    uint64_t capture;
    const void* node;
    Range output;
  };
  Launch& slot(const StreamEnd& end) {
    return launches_[(reinterpret_cast<uintptr_t>(end.node) >> 4) % kSlots];
  }
  static constexpr int kSlots = 64;
  std::mutex mutex_;
  Launch launches_[kSlots] = {};
};

// Of all kernels of this folder.
inline CapturedLaunches& captured_launches() {
  static CapturedLaunches captured;
  return captured;
}

}  // namespace resnet_fused::sm90
