#include <atomic>

#include "cuda/launch_help.h"
#include "cuda/sm80/head.h"
#include "cuda/stream_end.h"

namespace resnet_fused::sm80 {
namespace {

// Whether the kernel's code on this device has the wait for the kernel before. PTX of an older
// architecture may run on a newer one, and then it has not.
bool has_wait(const void* kernel) {
  static std::atomic<uint64_t> known{0}, yes{0};  // by device; all kernels here are compiled alike
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) {
    cudaGetLastError();
    return false;
  }
  const uint64_t bit = uint64_t{1} << device;
  if (!(known.load(std::memory_order_acquire) & bit)) {
    cudaFuncAttributes attributes;
    if (cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess) {
      cudaGetLastError();
      return false;
    }
    if (attributes.ptxVersion >= 90) yes.fetch_or(bit, std::memory_order_relaxed);
    known.fetch_or(bit, std::memory_order_release);
  }
  return yes.load(std::memory_order_relaxed) & bit;
}

// Whether a launch may overlap what is ahead of it in the stream, for which it waits before it
// reads: in a graph that must be a kernel, and a single one.
bool may_overlap(CUstream_st* stream) {
  const cuda::StreamEnd end = cuda::end_of(stream);
  if (end.runs || !end.node) return end.runs;
  cudaGraphNodeType type = cudaGraphNodeTypeEmpty;
  const auto node = static_cast<cudaGraphNode_t>(const_cast<void*>(end.node));
  if (cudaGraphNodeGetType(node, &type) == cudaSuccess) return type == cudaGraphNodeTypeKernel;
  cudaGetLastError();
  return false;
}

std::string launch(const void* kernel, dim3 grid, int shared_bytes, void* operands,
                   CUstream_st* stream) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(kHeadThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = has_wait(kernel) && may_overlap(stream);
  void* arguments[] = {operands};
  const cudaError_t code = cudaLaunchKernelExC(&config, kernel, arguments);
  return code == cudaSuccess ? "" : cuda::error("launch", code);
}

}  // namespace

std::string launch_pool(Type type, const Pool& p, int images, CUstream_st* stream) {
  Pool operands = p;
  const int bytes = element_bytes(type);
  const dim3 grid(images, pool_chunks(p.channels, bytes));
  return launch(pool_kernel_of(type), grid, pool_shared_bytes(bytes), &operands, stream);
}

std::string launch_linear(Type type, const Linear& p, CUstream_st* stream) {
  Linear operands = p;
  const bool one = p.images == 1;
  const dim3 grid(ceil_div(p.outputs, kHeadWarps), ceil_div(p.images, one ? 1 : kLinearImages));
  return launch(linear_kernel_of(type, one), grid, 0, &operands, stream);
}

}  // namespace resnet_fused::sm80
