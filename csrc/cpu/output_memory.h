// Memory for large outputs, kept and used again.
//
// Without, malloc hands large blocks back to the kernel when an output is freed, and the next one
// of its size faults every page in again, filled with zeros. At batch 32 that was 8% of ResNet-18's
// time (242 against 223 ms) and 14% of ResNet-50's (1193 against 1028); at batch 8, 6% of
// ResNet-50's. Engines that plan their memory never pay it.
#pragma once

#include <cstdint>

namespace resnet_fused {

// AddressSanitizer finds what is used after its end, or beyond it, in memory from malloc only.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kOwnMemory = false;
#else
constexpr bool kOwnMemory = true;
#endif

// Outputs below are left to PyTorch's allocator: malloc keeps blocks of their size anyway.
constexpr int64_t kLeastKept = int64_t{2} << 20;

// A block of at least `bytes` >= kLeastKept, aligned to huge pages, with whatever content.
void* take_output_memory(int64_t bytes);

// Takes it back; bytes: as asked for. Keeps it for the next call, up to a limit in total.
void give_back_output_memory(void* block, int64_t bytes);

// Returns everything that is kept to the system.
void drop_output_memory();

}  // namespace resnet_fused
