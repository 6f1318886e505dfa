// cuda_image_error: whether this binary has machine code for a device, or can make it from PTX.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/sm80/kernels.h"

namespace resnet_fused::cuda {
namespace {

// Empty, or the runtime's words. One kernel stands for all, which are compiled for the same
// devices; those of sm_90a alone are not called where they were left out.
std::string image_error(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, sm80::add_relu_float32());
  if (code == cudaSuccess) return "";
  cudaGetLastError();  // reported: the next caller shall not find it
  return cudaGetErrorString(code);
}

}  // namespace
}  // namespace resnet_fused::cuda

// An op without a tensor argument has no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(resnet_fused, CompositeExplicitAutograd, m) {
  m.impl("cuda_image_error", TORCH_BOX(&resnet_fused::cuda::image_error));
}
