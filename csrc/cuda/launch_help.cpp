#include "cuda/launch_help.h"

#include <mutex>
#include <set>
#include <utility>

namespace resnet_fused::cuda {

std::string error(const char* what, cudaError_t code) {
  cudaGetLastError();
  return std::string(what) + ": " + cudaGetErrorString(code);
}

cudaError_t allow_shared(const void* kernel, int bytes) {
  if (bytes <= 48 << 10) return cudaSuccess;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  if (cudaError_t code = cudaGetDevice(&device)) return code;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  const cudaError_t code =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code == cudaSuccess) allowed.insert({kernel, device});
  return code;
}

}  // namespace resnet_fused::cuda
