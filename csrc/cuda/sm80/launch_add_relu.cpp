#include "cuda/launch_help.h"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/launch.h"
#include "cuda/sm80/pointwise.h"

namespace resnet_fused::sm80 {

std::string launch_add_relu(Type type, const void* a, const void* b, void* y, int64_t count,
                            const Device& device, CUstream_st* stream) {
  const void* const kernel = type == Type::kBFloat16  ? add_relu_bfloat16()
                             : type == Type::kFloat16 ? add_relu_float16()
                                                      : add_relu_float32();
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
                    reinterpret_cast<uintptr_t>(y);
  bool aligned = bits % 16 == 0;
  const int each = aligned ? 16 / element_bytes(type) : 1;
  void* arguments[] = {&a, &b, &y, &count, &aligned};
  const cudaError_t code = cudaLaunchKernel(kernel, dim3(pointwise_blocks(count, each, device)),
                                            dim3(kPointwiseThreads), arguments, 0, stream);
  return code == cudaSuccess ? "" : cuda::error("launch", code);
}

}  // namespace resnet_fused::sm80
