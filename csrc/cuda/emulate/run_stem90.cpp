// The entry for the tests of the Hopper stem's kernel.
#include <cstring>

#include "cuda/emulate/run_stem.h"
#include "cuda/sm90/stem_kernel.cuh"

using namespace resnet_fused::sm90;

namespace {

struct Run {
  Problem problem;
  int tile, rows, bfloat16, relu, blocks, order;  // blocks: at most, of each tile of channels
  const void *x, *weight;
  const float *scale, *shift;
  void* y;
  char error[800];
};

template <typename T>
void kernel_of(int tile, const StemParams& p) {
  if (tile == 0) {
    stem_kernel<T, 0>(p);
  } else {
    stem_kernel<T, 1>(p);
  }
}

}  // namespace

extern "C" void stem90_run(Run* r) {
  const Problem& p = r->problem;
  r->error[0] = 0;
  const std::string why = stem_refuses(p);
  if (!why.empty() || stem_shared_bytes(p, kStemTiles[r->tile]) > kMostShared) {
    snprintf(r->error, sizeof r->error, "refused: %s", why.c_str());
    return;
  }
  const auto o = guarded_stem<StemOperands>(*r, emu::kDependent);
  const StemChoice choice{r->tile, r->rows};
  StemParams params = stem_params(p, choice, o);
  const size_t y_bytes = size_t(2) * p.n * params.pool_h * params.pool_w * p.k;
  params.y = emu::dev_alloc(y_bytes, "y", emu::kWriteOnce | emu::kDependent);
  const StemGrid grid = stem_grid(p, choice, {r->blocks});
  emu::Options options;
  options.order = std::min(r->order, 2);  // 2 and more: random, by this seed
  options.seed = uint32_t(r->order);
  options.async = true;
  const emu::Result result = emu::launch(
      dim3(std::min(grid.blocks, r->blocks), grid.channel_tiles), dim3(kStemThreads),
      grid.shared_bytes,
      [&] {
        if (r->bfloat16) {
          kernel_of<__nv_bfloat16>(r->tile, params);
        } else {
          kernel_of<__half>(r->tile, params);
        }
      },
      options);
  snprintf(r->error, sizeof r->error, "%s", result.error.c_str());
  memcpy(r->y, params.y, y_bytes);
}

// ---- the plan ----
extern "C" void stem90_why_not(const Problem* p, char* why, int size) {
  snprintf(why, size, "%s", stem_refuses(*p).c_str());
}
extern "C" void stem90_choice(const Problem* p, int multiprocessors, StemChoice* choice,
                              StemGrid* grid) {
  const Device device{multiprocessors, 8};
  *choice = choose_stem(*p, device);
  *grid = stem_grid(*p, *choice, device);
}
