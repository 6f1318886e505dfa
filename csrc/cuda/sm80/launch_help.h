// What the launches share: the runtime's errors as text, and shared memory beyond 48 KiB.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <string>

namespace resnet_fused::sm80 {

inline std::string error(const char* what, cudaError_t code) {
  cudaGetLastError();  // ours, and reported: the next caller shall not find it
  return std::string(what) + ": " + cudaGetErrorString(code);
}

// One kernel's, asked for once per device.
class SharedMemory {
 public:
  // bytes: the same at every call, or the most that any will need.
  cudaError_t allow(const void* kernel, int bytes) {
    if (bytes <= 48 << 10) return cudaSuccess;
    int device = 0;
    if (cudaError_t code = cudaGetDevice(&device)) return code;
    const uint64_t bit = device < 64 ? 1ull << device : 0;
    if (devices_.load(std::memory_order_relaxed) & bit) return cudaSuccess;
    const cudaError_t code =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (code == cudaSuccess) devices_.fetch_or(bit, std::memory_order_relaxed);
    return code;
  }

 private:
  std::atomic<uint64_t> devices_{0};
};

}  // namespace resnet_fused::sm80
