// Scratch memory that a thread keeps between calls.
#pragma once

#include <cstdint>

namespace resnet_fused {

// At least `count` floats, 64-byte aligned, valid until the next call on the same thread. The
// memory stays with the thread: in steady state nothing is allocated, and it is still warm in the
// cache.
float* thread_scratch(int64_t count);

// Asks for huge pages for a large, freshly allocated and untouched block: packed weights are read
// once per call, front to back, and 4 KiB pages then cost a TLB miss every 32 panel rows.
void advise_huge_pages(void* block, int64_t bytes);

}  // namespace resnet_fused
