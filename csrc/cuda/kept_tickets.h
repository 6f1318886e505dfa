// Split-K's tickets between launches. A kernel finds them at zero and leaves them at zero, so one
// buffer serves all launches of a stream, which follow one another, and needs no memset but its
// first.
//
// Not for a graph that is captured, which may be replayed beside what its stream runs by then: its
// tickets are its own, and cleared at each replay. A launch that aborts on the device may leave
// some that are not zero, but no kernel finds them: such an error stays with the CUDA context, and
// all later calls fail. A launch that was refused has not touched them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace resnet_fused::cuda {

class KeptTickets {
 public:
  // At least `count`, of a device's stream; null where allocate(n) returned null for n of them. It
  // returns zeros, or what will be zeros in the stream. They are never freed: all that a stream
  // ever gets is less than four times the most that it needed, or 16 KiB.
  template <typename Allocate>
  uint32_t* get(int device, const void* stream, int64_t count, const Allocate& allocate) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Kept& kept = kept_[{device, stream}];
    if (kept.count < count) {
      const int64_t room = std::max({count, 2 * kept.count, kLeast});
      uint32_t* const fresh = allocate(room);
      if (!fresh) return nullptr;
      kept = {fresh, room};
    }
    return kept.tickets;
  }

 private:
  struct Kept {
    uint32_t* tickets = nullptr;
    int64_t count = 0;
  };
  static constexpr int64_t kLeast = 4096;
  std::mutex mutex_;
  std::map<std::pair<int, const void*>, Kept> kept_;
};

}  // namespace resnet_fused::cuda
