#include "cuda/launch_help.h"
#include "cuda/sm80/stem.h"

namespace resnet_fused::sm80 {

std::string launch_stem(const Problem& p, Type type, const StemOperands& o, const Device& device,
                        CUstream_st* stream) {
  const std::string why = stem_refuses(p);
  if (!why.empty()) return why;
  if (type != Type::kBFloat16 && type != Type::kFloat16)
    return "its kernel with the max-pool has no float32";
  const int tile = choose_stem(p, device);
  const bool half = type == Type::kFloat16;
  const void* const kernel = half ? stem_float16(tile) : stem_bfloat16(tile);
  const StemGrid grid = stem_grid(p, kStemTiles[tile], device);
  if (cudaError_t code = cuda::allow_shared(kernel, kMostStemShared))
    return cuda::error("shared memory", code);
  StemParams params = stem_params(p, kStemTiles[tile], o);
  void* arguments[] = {&params};
  if (cudaError_t code = cudaLaunchKernel(kernel, dim3(grid.blocks, grid.channel_tiles),
                                          dim3(grid.threads), arguments, grid.shared_bytes, stream))
    return cuda::error("launch", code);
  return "";
}

}  // namespace resnet_fused::sm80
