// What an op has made and handed out as a number, until it is released.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace resnet_fused {

// Make it with `new` and never destroy it: at the end of the process torch, whose tensors it may
// hold, can be gone before it.
template <typename Made>
class Registry {
 public:
  int64_t add(std::shared_ptr<const Made> made) {
    const std::lock_guard<std::mutex> lock(mutex_);
    all_[++last_] = std::move(made);
    return last_;
  }
  std::shared_ptr<const Made> find(int64_t id) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = all_.find(id);
    return found == all_.end() ? nullptr : found->second;
  }
  void remove(int64_t id) {
    std::shared_ptr<const Made> last_owner;  // its tensors are freed after the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = all_.find(id);
    if (found == all_.end()) return;
    last_owner = std::move(found->second);
    all_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const Made>> all_;
  int64_t last_ = 0;
};

}  // namespace resnet_fused
