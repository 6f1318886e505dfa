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
// Planted bugs need few.
constexpr bool is_compiled([[maybe_unused]] int n, [[maybe_unused]] bool shared) {
#ifdef EMULATED_TILES
  return n != 216 && shared == (n != 232);
#else
  return true;
#endif
}
template <int kIndex = 0>
emu::Result launch_window(const TapShiftParams& k, int blocks, const emu::Options& options) {
  if constexpr (kIndex < kTapShiftNCount) {
    constexpr int kN = kTapShiftN[kIndex];
    if (k.window.n != kN) return launch_window<kIndex + 1>(k, blocks, options);
    const bool shared = k.conv.schedule.k > 64;
    if constexpr (is_compiled(kN, true))
      if (shared) return launch<kN, true>(k, blocks, options);
    if constexpr (is_compiled(kN, false))
      if (!shared) return launch<kN, false>(k, blocks, options);
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
  const emu::Result result = launch_window(k, r->blocks, options);
  snprintf(r->error, sizeof r->error, "%s", result.error.c_str());
  memcpy(r->y, o.y, y_bytes(p));
}

extern "C" void tap_shift_window_of(const Problem* p, Window* window, char* why, int size) {
  snprintf(why, size, "%s", tap_shift_refuses(*p).c_str());
  *window = tap_shift_window(*p);
}
