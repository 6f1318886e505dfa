#include "cuda/sm80/launch.h"

#include "cuda/launch_help.h"
#include "cuda/sm80/kernels.h"

namespace resnet_fused::sm80 {
namespace {

const void* kernel_of(Type type, int tile, bool shortcut) {
  switch (type) {
    case Type::kBFloat16:
      return kernel_bfloat16(tile, shortcut);
    case Type::kFloat16:
      return kernel_float16(tile, shortcut);
    case Type::kTf32:
      return kernel_tf32(tile, shortcut);
    default:
      return kernel_float32(tile, shortcut);
  }
}

}  // namespace

std::string launch(const Problem& p, Type type, const Choice& choice, const Operands& o,
                   CUstream_st* stream) {
  const std::string why = refuses(p, type, choice);
  if (!why.empty()) return why;
  const void* const kernel = kernel_of(type, choice.tile, p.shortcut_c > 0);
  const Grid grid = grid_of(p, type, choice);
  if (cudaError_t code = cuda::allow_shared(kernel, grid.shared_bytes))
    return cuda::error("shared memory", code);
  KernelParams params = params_of(p, type, choice, o);
  void* arguments[] = {&params};
  if (cudaError_t code = cudaLaunchKernel(kernel, dim3(grid.tiles, grid.splits), dim3(grid.threads),
                                          arguments, grid.shared_bytes, stream))
    return cuda::error("launch", code);
  return "";
}

}  // namespace resnet_fused::sm80
