// The entry for the tests: copies tensors into guarded buffers, runs the kernel, copies y back.
#include "cuda/emulate/run_sm90.h"

#include <cstring>

#include "cuda/sm90/conv_kernel.cuh"
#include "cuda/sm90/overlap.h"

// Which tiles are compiled, bit by bit; planted bugs need few.
#ifndef EMULATED_TILES
#define EMULATED_TILES_BFLOAT16 0x7ff
#define EMULATED_TILES_FLOAT16 0x098  // c64x256, p128x128, p64x64: the rest differ by conversions
#else
#define EMULATED_TILES_BFLOAT16 EMULATED_TILES
#define EMULATED_TILES_FLOAT16 0
#endif

using namespace resnet_fused::sm90;

namespace {

template <typename T, int kTile>
emu::Result launch(const KernelParams& k, int blocks, const emu::Options& options) {
  using C = Config<kTile>;
  std::function<void()> body;
  if (k.schedule.splits > 1) {
    if constexpr (splits_reduction(C::kT)) {
      body = k.shortcut_scale
                 ? std::function<void()>([&k] { conv_kernel<T, kTile, true, true>(k); })
                 : std::function<void()>([&k] { conv_kernel<T, kTile, false, true>(k); });
    }
  } else {
    body = k.shortcut_scale
               ? std::function<void()>([&k] { conv_kernel<T, kTile, true, false>(k); })
               : std::function<void()>([&k] { conv_kernel<T, kTile, false, false>(k); });
  }
  return emu::launch(dim3(blocks), dim3(C::kThreads), C::kSharedBytes, body, options);
}

template <typename T, int kTiles, int kTile = 0>
emu::Result launch_tile(int tile, const KernelParams& k, int blocks, const emu::Options& options) {
  if constexpr (kTile < kTileCount) {
    if constexpr (kTiles >> kTile & 1)
      if (tile == kTile) return launch<T, kTile>(k, blocks, options);
    return launch_tile<T, kTiles, kTile + 1>(tile, k, blocks, options);
  } else {
    return {"this tile is not compiled", {}};
  }
}

}  // namespace

extern "C" void sm90_run(Sm90Run* r) {
  const Problem& p = r->problem;
  const Choice choice{r->tile, r->splits};
  r->error[0] = 0;
  const std::string why = refuses(p, choice, {132, 8});  // an H100
  if (!why.empty()) {
    snprintf(r->error, sizeof r->error, "refused: %s", why.c_str());
    return;
  }
  const Operands o = guarded_operands(*r);
  emu::Options options;
  options.order = r->order;
  options.async = true;
  options.race = options.uninit = r->race;
  options.cluster = r->splits;
  KernelParams k;
  if (const char* refused = fill(&k, p, choice, o)) {
    snprintf(r->error, sizeof r->error, "TMA: %s", refused);
    return;
  }
  k.early_weights = r->early_weights;
  const int grid = r->splits > 1 ? work_items(k.schedule) : r->blocks;
  const emu::Result result =
      r->bfloat16 ? launch_tile<__nv_bfloat16, EMULATED_TILES_BFLOAT16>(r->tile, k, grid, options)
                  : launch_tile<__half, EMULATED_TILES_FLOAT16>(r->tile, k, grid, options);
  snprintf(r->error, sizeof r->error, "%s", result.error.c_str());
  memcpy(r->y, o.y, y_bytes(p));
}

// ---- the plan, which the tests hold too ----
extern "C" int sm90_tile_count() { return kTileCount; }
extern "C" const char* sm90_tile_name(int tile) { return kTiles[tile].name; }
extern "C" int sm90_tile_threads(int tile) { return 128 * (1 + kTiles[tile].tile.consumers); }
extern "C" int sm90_tile_shared_bytes(int tile) { return shared_bytes(kTiles[tile].tile); }
extern "C" void sm90_refuses(const Problem* p, char* why, int size) {
  snprintf(why, size, "%s", refuses(*p).c_str());
}
extern "C" void sm90_refuses_choice(const Problem* p, const Choice* choice, const Device* device,
                                    char* why, int size) {
  snprintf(why, size, "%s", refuses(*p, *choice, *device).c_str());
}
extern "C" void sm90_choose(const Problem* p, const Device* device, Choice* choice, int* blocks_out,
                            double* microseconds, char* name, int size) {
  *choice = choose(*p, *device);
  *blocks_out = blocks(*p, *choice, *device);
  *microseconds = cost(*p, *choice, *device).microseconds;
  snprintf(name, size, "%s", text(*choice).c_str());
}
extern "C" void sm90_ranked(const Problem* p, const Device* device, char* names, int size) {
  std::string lines;
  for (const Choice& choice : ranked(*p, *device)) lines += text(choice) + "\n";
  snprintf(names, size, "%s", lines.c_str());
}
extern "C" double sm90_cost(const Problem* p, const Choice* choice, const Device* device) {
  return cost(*p, *choice, *device).microseconds;
}
extern "C" int sm90_parse(const char* name, Choice* choice) { return parse(name, choice); }

// ---- which launches overlap: 1 the launch, 2 its weights besides ----
static CapturedLaunches tested_launches;  // of this library alone
extern "C" int sm90_overlap(const StreamEnd* end, const Range* weights, const Range* shortcut) {
  const Overlap allowed = tested_launches.allowed(*end, *weights, *shortcut);
  return allowed.launch + 2 * allowed.weights;
}
extern "C" void sm90_launched(const StreamEnd* end, const Range* output) {
  tested_launches.add(*end, *output);
}
