#include "cuda/sm80/launch.h"

#include <algorithm>

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

std::string launch_add_relu(Type type, const void* a, const void* b, void* y, int64_t count,
                            const Device& device, CUstream_st* stream) {
  constexpr int kThreads = 256, kBlocksPerSm = 8;  // 2048 threads fill a multiprocessor
  const void* const kernel = type == Type::kBFloat16  ? add_relu_bfloat16()
                             : type == Type::kFloat16 ? add_relu_float16()
                                                      : add_relu_float32();
  const auto bits = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) |
                    reinterpret_cast<uintptr_t>(y);
  bool aligned = bits % 16 == 0;
  const int64_t each = aligned ? 16 / element_bytes(type) : 1;
  const int64_t blocks = (count + each * kThreads - 1) / (each * kThreads);
  const int grid = int(std::min<int64_t>(blocks, int64_t(device.multiprocessors) * kBlocksPerSm));
  void* arguments[] = {&a, &b, &y, &count, &aligned};
  if (cudaError_t code = cudaLaunchKernel(kernel, dim3(grid), dim3(kThreads), arguments, 0, stream))
    return cuda::error("launch", code);
  return "";
}

}  // namespace resnet_fused::sm80
