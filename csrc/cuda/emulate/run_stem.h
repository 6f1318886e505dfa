// A stem's tensors in guarded buffers, for the entries of both kernels.
#pragma once

#include <cstring>

#include "cuda/emulate/emulate.h"

// Run: what a test hands over, with problem, relu, x, weight, scale and shift. Forgets all buffers
// before. flags: of every operand, besides that it is only read.
template <typename Operands, typename Run>
Operands guarded_stem(const Run& r, int flags) {
  const auto& p = r.problem;
  emu::dev_reset();
  const auto in = [flags](const void* from, size_t bytes, const char* name) {
    void* const d = emu::dev_alloc(bytes, name, emu::kReadOnly | flags);
    memcpy(d, from, bytes);
    return d;
  };
  Operands o{};
  o.relu = r.relu;
  o.x = in(r.x, size_t(2) * p.n * p.h * p.w * p.c, "x");
  o.weight = in(r.weight, size_t(2) * p.k * p.r * p.s * p.c, "weight");
  o.scale = static_cast<const float*>(in(r.scale, 4 * p.k, "scale"));
  o.shift = static_cast<const float*>(in(r.shift, 4 * p.k, "shift"));
  return o;
}
