// For functions that the host and the kernels share.
#pragma once

#if defined(__CUDACC__)
#define RF_HD __host__ __device__ __forceinline__
#else
#define RF_HD inline
#endif

namespace resnet_fused::cuda {

RF_HD constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace resnet_fused::cuda
