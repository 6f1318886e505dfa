#include "cuda/sm90/launch.h"

#include "cuda/launch_help.h"
#include "cuda/sm90/kernels.h"
#include "cuda/sm90/overlap.h"
#include "cuda/sm90/tap_shift.h"

namespace resnet_fused::sm90 {
namespace {

struct Start {
  const void* kernel = nullptr;
  void* params = nullptr;
  int threads = 0, shared_bytes = 0, allowed = 0;
};

}  // namespace

std::string launch(const Problem& p, const Choice& choice, const Operands& o, const Device& device,
                   CUstream_st* stream) {
  const std::string why = refuses(p, choice, device);
  if (!why.empty()) return why;
  const bool shortcut = p.shortcut_c > 0;
  const int64_t pixels = int64_t(p.n) * out_h(p) * out_w(p);
  CapturedLaunches& captured = captured_launches();
  const StreamEnd before = cuda::end_of(stream);
  const Overlap allowed =
      captured.allowed(before, range_of(o.weight, int64_t(2) * p.k * p.r * p.s * p.c),
                       range_of(o.shortcut_weight, int64_t(2) * p.k * p.shortcut_c));
  Start start;
  KernelParams tiled;
  TapShiftParams windows;
  if (choice.tile == kTapShift) {
    const Window g = tap_shift_window(p);
    if (const char* refused = fill(&windows, p, g, o)) return refused;
    const bool shared = p.k > 64;
    start.kernel = o.bfloat16 ? tap_shift_bfloat16(g.n, shared, shortcut)
                              : tap_shift_float16(g.n, shared, shortcut);
    // A kernel serves maps of several sizes: all that a block may have is asked for.
    start = {start.kernel, &windows, 384, tap_shift_shared_bytes(g, shared), kMostShared};
  } else {
    if (const char* refused = fill(&tiled, p, choice, o)) return refused;
    tiled.early_weights = allowed.weights;
    const Tile& t = kTiles[choice.tile].tile;
    const bool split = tiled.schedule.splits > 1;
    start.kernel = o.bfloat16 ? kernel_bfloat16(choice.tile, shortcut, split)
                              : kernel_float16(choice.tile, shortcut, split);
    start = {start.kernel, &tiled, 128 * (1 + t.consumers), shared_bytes(t), shared_bytes(t)};
  }
  if (cudaError_t code = cuda::allow_shared(start.kernel, start.allowed))
    return cuda::error("shared memory", code);

  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (allowed.launch) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (choice.splits > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {unsigned(choice.splits), 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks(p, choice, device));
  config.blockDim = dim3(start.threads);
  config.dynamicSmemBytes = start.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  if (cudaError_t code = cudaLaunchKernelExC(&config, start.kernel, &start.params))
    return cuda::error("launch", code);
  if (!before.runs) captured.add(cuda::end_of(stream), range_of(o.y, 2 * pixels * p.k));
  return "";
}

}  // namespace resnet_fused::sm90
