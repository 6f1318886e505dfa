#include "cuda/launch_help.h"
#include "cuda/sm90/overlap.h"
#include "cuda/sm90/stem.h"

namespace resnet_fused::sm90 {

std::string launch_stem(const Problem& p, const StemOperands& o, const Device& device,
                        CUstream_st* stream) {
  const std::string why = stem_refuses(p);
  if (!why.empty()) return why;
  const StemChoice choice = choose_stem(p, device);
  const void* const kernel = o.bfloat16 ? stem_bfloat16(choice.tile) : stem_float16(choice.tile);
  if (cudaError_t code = cuda::allow_shared(kernel, kMostShared))
    return cuda::error("shared memory", code);
  const StemGrid grid = stem_grid(p, choice, device);
  StemParams params = stem_params(p, choice, o);

  // The next convolution's launch may overlap this one's end; it reads nothing early besides.
  const StreamEnd before = cuda::end_of(stream);
  const Range none{};
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.blocks, grid.channel_tiles);
  config.blockDim = dim3(kStemThreads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = captured_launches().allowed(before, none, none).launch;
  void* arguments[] = {&params};
  if (cudaError_t code = cudaLaunchKernelExC(&config, kernel, arguments))
    return cuda::error("launch", code);
  const int64_t outputs = int64_t(p.n) * params.pool_h * params.pool_w * p.k;
  if (!before.runs) captured_launches().add(cuda::end_of(stream), range_of(o.y, 2 * outputs));
  return "";
}

}  // namespace resnet_fused::sm90
