#include "cuda/stream_end.h"

#include <cuda_runtime_api.h>

namespace resnet_fused::cuda {

StreamEnd end_of(CUstream_st* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  const cudaGraphNode_t* nodes = nullptr;
  size_t count = 0;
#if CUDART_VERSION >= 13000
  const cudaError_t code =
      cudaStreamGetCaptureInfo(stream, &status, &capture, nullptr, &nodes, nullptr, &count);
#else
  const cudaError_t code =
      cudaStreamGetCaptureInfo_v2(stream, &status, &capture, nullptr, &nodes, &count);
#endif
  if (code != cudaSuccess) cudaGetLastError();  // an edge of a special kind, among others
  const bool captured = code == cudaSuccess && status == cudaStreamCaptureStatusActive;
  return {code == cudaSuccess && status == cudaStreamCaptureStatusNone, capture,
          captured && count == 1 ? nodes[0] : nullptr};
}

}  // namespace resnet_fused::cuda
