// For functions that the host and the kernels share.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RF_HD __host__ __device__ __forceinline__
#else
#define RF_HD inline
#endif

namespace resnet_fused::cuda {

RF_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
// The next multiple.
RF_HD constexpr int64_t up_to(int64_t size, int64_t of) { return (size + of - 1) / of * of; }

}  // namespace resnet_fused::cuda
