#include "cuda/launch_help.h"
#include "cuda/sm80/tail.h"

namespace resnet_fused::sm80 {

std::string launch_tail(const TailProblem& p, Type type, const TailOperands& o,
                        CUstream_st* stream) {
  const std::string why = tail_refuses(p);
  if (!why.empty()) return why;
  if (type != Type::kBFloat16 && type != Type::kFloat16)
    return "its kernel for two convolutions has no float32";
  const int tile = tail_tile(p);
  const bool half = type == Type::kFloat16;
  const void* const kernel = half ? tail_float16(tile) : tail_bfloat16(tile);
  const int bytes = tail_shared_bytes(kTailTiles[tile].tile);
  if (cudaError_t code = cuda::allow_shared(kernel, bytes))
    return cuda::error("shared memory", code);
  TailParams params = tail_params(p, o);
  void* arguments[] = {&params};
  if (cudaError_t code =
          cudaLaunchKernel(kernel, dim3(tail_blocks(p)), dim3(threads(kTailTiles[tile].tile)),
                           arguments, bytes, stream))
    return cuda::error("launch", code);
  return "";
}

}  // namespace resnet_fused::sm80
