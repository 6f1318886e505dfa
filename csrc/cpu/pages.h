// Memory straight from the system, in huge pages where it has them: with 4 KiB pages, reading front
// to back costs a TLB miss every 64 cache lines.
#pragma once

#include <cstdint>

#include "conv.h"

namespace resnet_fused {

constexpr int64_t kHugePage = int64_t{2} << 20;  // bytes

inline int64_t whole_pages(int64_t bytes) { return ceil_div(bytes, kHugePage) * kHugePage; }

// `bytes` bytes, whole huge pages of zeros, aligned to one. `what`: who needs them, for the error.
char* map_pages(int64_t bytes, const char* what);

void unmap_pages(char* pages, int64_t bytes);

// Asks for huge pages for a large, freshly allocated and untouched block.
void advise_huge_pages(void* block, int64_t bytes);

}  // namespace resnet_fused
