// Which values of a tensor stand for all of it: every one of a vector, kSamples spread over others.
// Knows nothing of torch: csrc/python/snapshot.h looks at them, too.
#pragma once

#include <cstdint>

namespace resnet_fused {

constexpr int64_t kSamples = 64;

// A tensor in memory; size: bytes of a value, strides in values.
struct Layout {
  const char* data;
  int64_t size, dims;
  const int64_t *sizes, *strides;

  int64_t numel() const {
    int64_t numel = 1;
    for (int64_t d = 0; d < dims; ++d) numel *= sizes[d];
    return numel;
  }
};

// Calls visit(address, bytes) for each run of sampled values until it returns false; returns
// whether it never did.
template <typename Visit>
bool visit_samples(const Layout& t, const Visit& visit) {
  const int64_t numel = t.numel();
  if (numel == 0) return true;
  if (t.dims == 1 && t.strides[0] == 1) return visit(t.data, numel * t.size);
  const int64_t count = t.dims <= 1 || numel < kSamples ? numel : kSamples;
  const int64_t step = numel / count;
  for (int64_t i = 0; i < count; ++i) {
    // The offset within each step differs, or a step that is a multiple of the kernel's area would
    // always look at the same tap.
    int64_t index = i * step + (i * 5) % step;
    int64_t offset = 0;
    for (int64_t d = t.dims; d-- > 0;) {
      offset += index % t.sizes[d] * t.strides[d];
      index /= t.sizes[d];
    }
    if (!visit(t.data + offset * t.size, t.size)) return false;
  }
  return true;
}

}  // namespace resnet_fused
