// The tap-shift kernel's entry for the tests; the window may be given, to try those of other maps.
#include <cstring>

#include "cuda/emulate/run_sm90.h"
#include "cuda/sm90/tap_shift_kernel.cuh"

using namespace resnet_fused::sm90;

namespace {

template <int kN, bool kShared>
emu::Result launch(const TapShiftParams& k, int blocks, const emu::Options& options) {
  using T = __nv_bfloat16;
  std::function<void()> body = [&k] { tap_shift_kernel<T, kN, kShared, false>(k); };
  if (k.shortcut_chunks) body = [&k] { tap_shift_kernel<T, kN, kShared, true>(k); };
  return emu::launch(dim3(blocks), dim3(384), tap_shift_shared_bytes(k.window, kShared), body,
                     options);
}
// What the tests use; less with planted bugs.
emu::Result launch(const TapShiftParams& k, int blocks, const emu::Options& options) {
  const bool shared = k.conv.schedule.k > 64;
  switch (k.window.n * 2 + shared) {
    case 208 * 2 + 1:
      return launch<208, true>(k, blocks, options);
    case 232 * 2:
      return launch<232, false>(k, blocks, options);
    case 256 * 2 + 1:
      return launch<256, true>(k, blocks, options);
#ifndef EMULATED_TILES
    case 208 * 2:
      return launch<208, false>(k, blocks, options);
    case 216 * 2 + 1:
      return launch<216, true>(k, blocks, options);
    case 256 * 2:
      return launch<256, false>(k, blocks, options);
#endif
  }
  return {"this window is not compiled", {}};
}

}  // namespace

extern "C" void tap_shift_run(Sm90Run* r, int rows, int images, int n) {
  const Problem& p = r->problem;
  r->error[0] = 0;
  const std::string why = tap_shift_refuses(p);
  if (!why.empty()) {
    snprintf(r->error, sizeof r->error, "refused: %s", why.c_str());
    return;
  }
  Operands o = guarded_operands(*r);
  const Window g = n ? window_of(p, rows, images, n) : tap_shift_window(p);
  TapShiftParams k;
  if (const char* refused = fill(&k, p, g, o)) {
    snprintf(r->error, sizeof r->error, "TMA: %s", refused);
    return;
  }
  emu::Options options;
  options.order = r->order;
  options.async = true;
  options.race = options.uninit = r->race;
  const emu::Result result = launch(k, r->blocks, options);
  snprintf(r->error, sizeof r->error, "%s", result.error.c_str());
  memcpy(r->y, o.y, y_bytes(p));
}

extern "C" void tap_shift_window_of(const Problem* p, Window* window, char* why, int size) {
  snprintf(why, size, "%s", tap_shift_refuses(*p).c_str());
  *window = tap_shift_window(*p);
}
