// What this machine can do at best, for kernels to be held against: multiply-adds and reads a
// second.
//
// Multiplications: every thread runs kChains accumulators that wait only for themselves, all
// operands in registers. That hides a latency of 6 cycles at two multiply-adds a cycle, the most
// that any CPU needs so far, and leaves the loop's own instructions below a tenth of the issue
// slots.
#pragma once

#include <cstdint>

namespace resnet_fused {

constexpr int kChains = 12;

// Multiply-adds a second of all threads together on the instruction set in use, measured for
// `seconds`.
double multiply_peak(double seconds);
// The same for products of bfloat16 pairs summed in float32; throws where the set has none.
double multiply_peak_bf16(double seconds);

// The exclusive or of all whole 8-byte words, a share of them read by each thread: what memory lets
// all cores read together.
uint64_t read_words(const void* data, int64_t bytes);

}  // namespace resnet_fused
