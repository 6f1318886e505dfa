#include "cuda/context.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <mutex>

#include "check.h"
#include "cuda/launch_help.h"
#ifndef RESNET_FUSED_WITHOUT_SM90
#include "cuda/sm90/cluster.h"
#endif

namespace resnet_fused::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t code = cudaDeviceGetAttribute(&value, which, device);
  if (code != cudaSuccess) cudaGetLastError();
  check(code == cudaSuccess, "cuda:", device, ": ", cudaGetErrorString(code));
  return value;
}

}  // namespace

const DeviceFacts& device_facts(int device) {
  static std::mutex mutex;
  static std::map<int, DeviceFacts> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  DeviceFacts facts{attribute(cudaDevAttrMultiProcessorCount, device),
                    attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                    attribute(cudaDevAttrComputeCapabilityMajor, device),
                    attribute(cudaDevAttrComputeCapabilityMinor, device), 1};
#ifndef RESNET_FUSED_WITHOUT_SM90
  if (facts.major == 9 && facts.minor == 0) {
    const torch::stable::accelerator::DeviceGuard guard(device);
    facts.largest_cluster = sm90::largest_cluster();
  }
#endif
  return known.emplace(device, facts).first->second;
}

CUstream_st* current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<CUstream_st*>(stream);
}

std::string clear(uint32_t* words, int64_t count, CUstream_st* stream) {
  const cudaError_t code = cudaMemsetAsync(words, 0, 4 * count, stream);
  return code == cudaSuccess ? "" : error("workspace", code);
}

bool runs_in_order(CUstream_st* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t code = cudaStreamIsCapturing(stream, &status);
  if (code != cudaSuccess) cudaGetLastError();
  return code == cudaSuccess && status == cudaStreamCaptureStatusNone &&
         stream != cudaStreamPerThread;
}

uint32_t* new_zeros(int64_t count, CUstream_st* stream) {
  // Another thread may be capturing, which forbids cudaMalloc to all that do not say otherwise.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  void* words = nullptr;
  cudaError_t code = cudaMalloc(&words, 4 * count);
  if (code == cudaSuccess) code = cudaMemsetAsync(words, 0, 4 * count, stream);
  if (code != cudaSuccess) {
    cudaGetLastError();
    cudaFree(words);
    words = nullptr;
  }
  cudaThreadExchangeStreamCaptureMode(&mode);
  return static_cast<uint32_t*>(words);
}

}  // namespace resnet_fused::cuda
