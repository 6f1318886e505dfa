// Memory that a thread keeps between calls: in steady state nothing is allocated, and it is still
// warm in the cache.
#pragma once

#include <cstdint>

#include "conv.h"

namespace resnet_fused {

// Bytes until the next piece of such memory may begin: pieces share no cache line.
inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// At least `count` floats of scratch for a job, 64-byte aligned, valid until the next call on the
// same thread.
float* thread_scratch(int64_t count);

// At least `bytes` bytes, 64-byte aligned, beside the scratch memory, valid likewise: what an op
// keeps while its jobs run, of which the calling thread takes some itself.
void* thread_arena(int64_t bytes);

}  // namespace resnet_fused
