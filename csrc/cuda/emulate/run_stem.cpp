// The entry for the tests of the stem's kernel: convolution and max-pool in one.
#include "cuda/emulate/run_stem.h"

#include <cstring>

#include "cuda/sm80/stem.cuh"

using namespace resnet_fused::sm80;

namespace {

struct Run {
  Problem problem;
  int tile, type, relu, blocks, order;  // blocks: at most, of each tile of channels
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

extern "C" void stem_run(Run* r) {
  const Problem& p = r->problem;
  r->error[0] = 0;
  const std::string why = stem_refuses(p);
  const StemTile& tile = kStemTiles[r->tile];
  if (!why.empty() || stem_shared_bytes(p, tile) > kMostStemShared) {
    snprintf(r->error, sizeof r->error, "refused: %s", why.c_str());
    return;
  }
  const auto o = guarded_stem<StemOperands>(*r, 0);
  StemParams params = stem_params(p, tile, o);
  const size_t y_bytes = size_t(2) * p.n * params.pool_h * params.pool_w * p.k;
  params.y = emu::dev_alloc(y_bytes, "y", emu::kWriteOnce);
  const StemGrid grid = stem_grid(p, tile, {r->blocks, 0});
  emu::Options options;
  options.order = std::min(r->order, 2);  // 2 and more: random, by this seed
  options.seed = uint32_t(r->order);
  const bool half = Type(r->type) == Type::kFloat16;
  const emu::Result result = emu::launch(
      dim3(std::min(grid.blocks, r->blocks), grid.channel_tiles), dim3(grid.threads),
      grid.shared_bytes,
      [&] {
        if (half) {
          kernel_of<__half>(r->tile, params);
        } else {
          kernel_of<__nv_bfloat16>(r->tile, params);
        }
      },
      options);
  snprintf(r->error, sizeof r->error, "%s", result.error.c_str());
  if (!r->error[0] && result.stats.bank_conflicts)
    snprintf(r->error, sizeof r->error, "ldmatrix met %ld bank conflicts",
             long(result.stats.bank_conflicts));
  memcpy(r->y, params.y, y_bytes);
}

// ---- the plan ----
extern "C" void stem_why_not(const Problem* p, char* why, int size) {
  snprintf(why, size, "%s", stem_refuses(*p).c_str());
}
extern "C" int stem_choice(const Problem* p, int multiprocessors, int shared_bytes,
                           StemGrid* grid) {
  const Device device{multiprocessors, shared_bytes};
  const int tile = choose_stem(*p, device);
  *grid = stem_grid(*p, kStemTiles[tile], device);
  return tile;
}
