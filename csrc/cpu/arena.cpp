#include "cpu/arena.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace resnet_fused {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

struct Arena {
  float* block = nullptr;
  int64_t count = 0;

  ~Arena() { std::free(block); }

  void reserve(int64_t wanted) {
    if (wanted <= count) return;
    std::free(block);
    block = nullptr;
    count = 0;
    const int64_t bytes = wanted * static_cast<int64_t>(sizeof(float));
    const int64_t unit = bytes >= kHugePage ? kHugePage : 64;
    const int64_t rounded = (bytes + unit - 1) / unit * unit;
    block = static_cast<float*>(
        std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(rounded)));
    if (!block) throw std::bad_alloc();
    advise_huge_pages(block, rounded);
    count = rounded / static_cast<int64_t>(sizeof(float));
  }
};

}  // namespace

float* thread_scratch(int64_t count) {
  static thread_local Arena arena;
  arena.reserve(count);
  return arena.block;
}

void advise_huge_pages(void* block, int64_t bytes) {
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(block) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace resnet_fused
