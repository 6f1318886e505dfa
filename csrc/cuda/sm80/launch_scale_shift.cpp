#include "cuda/launch_help.h"
#include "cuda/sm80/scale_shift.h"

namespace resnet_fused::sm80 {

std::string launch_scale_shift(Type type, ScaleShift p, const Device& device, CUstream_st* stream) {
  p.aligned = in_vectors(p, type);
  const void* const kernel = type == Type::kBFloat16  ? scale_shift_bfloat16()
                             : type == Type::kFloat16 ? scale_shift_float16()
                                                      : scale_shift_float32();
  const int each = p.aligned ? 16 / element_bytes(type) : 1;
  void* arguments[] = {&p};
  const cudaError_t code = cudaLaunchKernel(kernel, dim3(pointwise_blocks(p.count, each, device)),
                                            dim3(kPointwiseThreads), arguments, 0, stream);
  return code == cudaSuccess ? "" : cuda::error("launch", code);
}

}  // namespace resnet_fused::sm80
