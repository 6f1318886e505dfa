#include "cpu/pages.h"

#include <sys/mman.h>

#include "check.h"

namespace resnet_fused {

char* map_pages(int64_t bytes, const char* what) {
  const int64_t reserved = bytes + kHugePage;  // some part of it is aligned
  void* const start = mmap(nullptr, static_cast<size_t>(reserved), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(start != MAP_FAILED, "out of memory: ", what, " needs ", bytes, " bytes");
  char* const first = static_cast<char*>(start);
  const int64_t before =
      -static_cast<int64_t>(reinterpret_cast<uintptr_t>(first)) & (kHugePage - 1);
  unmap_pages(first, before);
  unmap_pages(first + before + bytes, kHugePage - before);
  advise_huge_pages(first + before, bytes);
  return first + before;
}

void unmap_pages(char* pages, int64_t bytes) {
  if (bytes > 0) munmap(pages, static_cast<size_t>(bytes));
}

void advise_huge_pages(void* block, int64_t bytes) {
  const uintptr_t begin =
      (reinterpret_cast<uintptr_t>(block) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(block) + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

}  // namespace resnet_fused
