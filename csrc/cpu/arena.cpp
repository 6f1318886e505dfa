#include "cpu/arena.h"

#include <cstdlib>

#include "check.h"
#include "cpu/pages.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace resnet_fused {
namespace {

// Aligned for ThreadSanitizer: it takes a thread's variables that begin 16 bytes behind the start
// of a page for a block with a header, whose size it then reads from what happens to lie there.
struct alignas(64) Arena {
  void* block = nullptr;
  int64_t size = 0;

  ~Arena() { std::free(block); }

  // Under AddressSanitizer what lies beyond the `wanted` bytes may not be touched.
  void* at_least(int64_t wanted) {
    reserve(wanted);
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(block, static_cast<size_t>(wanted));
    __asan_poison_memory_region(static_cast<char*>(block) + wanted,
                                static_cast<size_t>(size - wanted));
#endif
    return block;
  }

  void reserve(int64_t bytes) {
    if (bytes <= size) return;
    std::free(block);
    block = nullptr;
    size = 0;
    const int64_t unit = bytes >= kHugePage ? kHugePage : 64;
    const int64_t rounded = ceil_div(bytes, unit) * unit;
    block = std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(rounded));
    check(block, "out of memory: a thread needs ", rounded, " bytes of scratch memory");
    advise_huge_pages(block, rounded);
    size = rounded;
  }
};

}  // namespace

float* thread_scratch(int64_t count) {
  static thread_local Arena scratch;
  return static_cast<float*>(scratch.at_least(count * static_cast<int64_t>(sizeof(float))));
}

void* thread_arena(int64_t bytes) {
  static thread_local Arena arena;
  return arena.at_least(bytes);
}

}  // namespace resnet_fused
