#include "cuda/sm90/launch.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <mutex>

#include "cuda/sm90/kernels.h"
#include "cuda/sm90/params.h"

namespace resnet_fused::sm90 {
namespace {

std::string error(const char* what, cudaError_t code) {
  cudaGetLastError();
  return std::string(what) + ": " + cudaGetErrorString(code);
}

// Shared memory beyond 48 KiB is asked for once per kernel and device.
cudaError_t allow_shared(const void* kernel, int slot, int bytes) {
  static std::atomic<uint64_t> allowed[2 * 4 * kTileCount];
  int device = 0;
  if (cudaError_t code = cudaGetDevice(&device)) return code;
  const uint64_t bit = device < 64 ? 1ull << device : 0;
  if (allowed[slot].load(std::memory_order_relaxed) & bit) return cudaSuccess;
  const cudaError_t code =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (code == cudaSuccess) allowed[slot].fetch_or(bit, std::memory_order_relaxed);
  return code;
}

// What these kernels wrote last, by stream. A launch overlaps the one before only where that is
// known not to have written its weights.
struct LastOutput {
  CUstream_st* stream;
  uintptr_t begin, end;
};
bool may_overlap(CUstream_st* stream, const LastOutput& weights, const LastOutput& shortcut,
                 const LastOutput& y) {
  static std::mutex mutex;
  static LastOutput last[256];
  const std::lock_guard<std::mutex> lock(mutex);
  LastOutput& slot = last[(reinterpret_cast<uintptr_t>(stream) >> 4) % 256];
  const auto apart = [&](const LastOutput& range) {
    return range.end <= slot.begin || slot.end <= range.begin;
  };
  const bool known = slot.stream == stream && slot.end;
  const bool result = known && apart(weights) && apart(shortcut);
  slot = y;
  return result;
}
LastOutput range_of(CUstream_st* stream, const void* at, int64_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(at);
  return {stream, begin, begin + bytes};
}

}  // namespace

std::string launch(const Problem& p, const Choice& choice, const Operands& o, const Device& device,
                   CUstream_st* stream) {
  const std::string why = refuses(p, choice);
  if (!why.empty()) return why;
  KernelParams params;
  if (const char* refused = fill(&params, p, choice, o)) return refused;

  const Tile& t = kTiles[choice.tile].tile;
  const bool shortcut = p.shortcut_c > 0, split = params.schedule.splits > 1;
  const void* const kernel = o.bfloat16 ? kernel_bfloat16(choice.tile, shortcut, split)
                                        : kernel_float16(choice.tile, shortcut, split);
  const int slot = ((choice.tile * 2 + o.bfloat16) * 2 + shortcut) * 2 + split;
  if (cudaError_t code = allow_shared(kernel, slot, shared_bytes(t)))
    return error("shared memory", code);

  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks(p, choice, device));
  config.blockDim = dim3(128 * (1 + t.consumers));
  config.dynamicSmemBytes = shared_bytes(t);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs =
      may_overlap(stream, range_of(stream, o.weight, int64_t(2) * p.k * p.r * p.s * p.c),
                  range_of(stream, o.shortcut_weight, int64_t(2) * p.k * p.shortcut_c),
                  range_of(stream, o.y, int64_t(2) * params.schedule.pixels * p.k));
  void* arguments[] = {&params};
  if (cudaError_t code = cudaLaunchKernelExC(&config, kernel, arguments))
    return error("launch", code);
  return "";
}

}  // namespace resnet_fused::sm90
