// What a test hands over, and its tensors in guarded buffers.
#pragma once

#include <cstring>

#include "cuda/emulate/emulate.h"
#include "cuda/sm90/params.h"

struct Sm90Run {
  resnet_fused::sm90::Problem problem;
  int tile, splits, blocks;
  int bfloat16, relu, early_weights, order, race;
  const void *x, *weight, *shortcut_x, *shortcut_weight;
  const float *scale, *shift, *shortcut_scale, *shortcut_shift;
  const void* residual;
  void* y;
  char error[800];
};

inline size_t y_bytes(const resnet_fused::sm90::Problem& p) {
  return 2 * size_t(p.n) * out_h(p) * out_w(p) * p.k;
}

// Forgets all buffers before.
inline resnet_fused::sm90::Operands guarded_operands(const Sm90Run& r) {
  const resnet_fused::sm90::Problem& p = r.problem;
  emu::dev_reset();
  const auto in = [](const void* from, size_t bytes, const char* name, int flags) -> void* {
    if (!from) return nullptr;
    void* const d = emu::dev_alloc(bytes, name, flags | emu::kReadOnly);
    memcpy(d, from, bytes);
    return d;
  };
  const auto floats = [&](const float* from, const char* name) {
    return static_cast<float*>(in(from, 4 * p.k, name, emu::kDependent));
  };
  resnet_fused::sm90::Operands o{};
  o.bfloat16 = r.bfloat16;
  o.relu = r.relu;
  o.x = in(r.x, 2 * size_t(p.n) * p.h * p.w * p.c, "x", emu::kDependent);
  const int weights = r.early_weights ? 0 : emu::kDependent;
  o.weight = in(r.weight, 2 * size_t(p.k) * p.r * p.s * p.c, "weight", weights);
  o.shortcut_x = in(r.shortcut_x, 2 * size_t(p.n) * p.shortcut_h * p.shortcut_w * p.shortcut_c,
                    "shortcut_x", emu::kDependent);
  o.shortcut_weight =
      in(r.shortcut_weight, 2 * size_t(p.k) * p.shortcut_c, "shortcut_weight", weights);
  o.scale = floats(r.scale, "scale");
  o.shift = floats(r.shift, "shift");
  o.shortcut_scale = floats(r.shortcut_scale, "shortcut_scale");
  o.shortcut_shift = floats(r.shortcut_shift, "shortcut_shift");
  o.residual = in(r.residual, y_bytes(p), "residual", emu::kDependent);
  o.y = emu::dev_alloc(y_bytes(p), "y", emu::kWriteOnce | emu::kDependent);
  return o;
}
