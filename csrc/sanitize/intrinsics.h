// Masked vector accesses under a sanitizer; `SANITIZE=... setup.py` includes this file first
// everywhere.
//
// gcc checks plain vector loads and stores, but the masked ones are builtins that it does not look
// into: the tail of every row of channels could read or write anywhere. Here each of them tells the
// sanitizer of its live lanes first. tests/test_sanitize.py refuses a kernel that uses a masked
// access that is missing here.
#pragma once

#include <immintrin.h>

#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_loadN(const void*, uintptr_t);
extern "C" void __asan_storeN(void*, uintptr_t);
#endif
#ifdef __SANITIZE_THREAD__
extern "C" void __tsan_read_range(const void*, uintptr_t);
extern "C" void __tsan_write_range(void*, uintptr_t);
#endif

namespace resnet_fused::sanitize {

// The live lanes of a masked access, as runs [first, first + bytes).
template <typename Announce>
static inline void for_each_run(uint64_t mask, int lane_bytes, const Announce& announce) {
  for (int lane = 0; mask >> lane != 0;) {
    if (!(mask >> lane & 1)) {
      ++lane;
      continue;
    }
    int end = lane;
    while (end < 64 && (mask >> end & 1)) ++end;
    announce(lane * lane_bytes, (end - lane) * lane_bytes);
    if (end == 64) return;
    lane = end;
  }
}

static inline void announce_read(const void* source, uint64_t mask, int lane_bytes) {
  for_each_run(mask, lane_bytes, [&](int first, int bytes) {
    const char* at = static_cast<const char*>(source) + first;
#ifdef __SANITIZE_ADDRESS__
    __asan_loadN(at, static_cast<uintptr_t>(bytes));
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_read_range(at, static_cast<uintptr_t>(bytes));
#endif
    (void)at, (void)bytes;
  });
}

static inline void announce_write(void* target, uint64_t mask, int lane_bytes) {
  for_each_run(mask, lane_bytes, [&](int first, int bytes) {
    char* at = static_cast<char*>(target) + first;
#ifdef __SANITIZE_ADDRESS__
    __asan_storeN(at, static_cast<uintptr_t>(bytes));
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_write_range(at, static_cast<uintptr_t>(bytes));
#endif
    (void)at, (void)bytes;
  });
}

}  // namespace resnet_fused::sanitize

#define RESNET_FUSED_CHECKED(isa) \
  static inline __attribute__((target(isa), always_inline, artificial))

RESNET_FUSED_CHECKED("avx")
__m256 resnet_fused_maskload_ps(const float* source, __m256i mask) {
  const int lanes = _mm256_movemask_ps(_mm256_castsi256_ps(mask));
  resnet_fused::sanitize::announce_read(source, static_cast<uint64_t>(lanes), 4);
  return _mm256_maskload_ps(source, mask);
}
RESNET_FUSED_CHECKED("avx")
void resnet_fused_maskstore_ps(float* target, __m256i mask, __m256 value) {
  const int lanes = _mm256_movemask_ps(_mm256_castsi256_ps(mask));
  resnet_fused::sanitize::announce_write(target, static_cast<uint64_t>(lanes), 4);
  _mm256_maskstore_ps(target, mask, value);
}
#define _mm256_maskload_ps resnet_fused_maskload_ps
#define _mm256_maskstore_ps resnet_fused_maskstore_ps

// maskz_loadu and mask_storeu of one vector type and element size.
#define RESNET_FUSED_CHECKED_MASKED(isa, prefix, suffix, Register, Mask, lane_bytes)        \
  RESNET_FUSED_CHECKED(isa)                                                                 \
  Register resnet_fused_maskz_loadu_##prefix##suffix(Mask mask, const void* source) {       \
    resnet_fused::sanitize::announce_read(source, mask, lane_bytes);                        \
    return prefix##_maskz_loadu_##suffix(mask, source);                                     \
  }                                                                                         \
  RESNET_FUSED_CHECKED(isa)                                                                 \
  void resnet_fused_mask_storeu_##prefix##suffix(void* target, Mask mask, Register value) { \
    resnet_fused::sanitize::announce_write(target, mask, lane_bytes);                       \
    prefix##_mask_storeu_##suffix(target, mask, value);                                     \
  }

RESNET_FUSED_CHECKED_MASKED("avx512f", _mm512, ps, __m512, __mmask16, 4)
RESNET_FUSED_CHECKED_MASKED("avx512bw,avx512vl", _mm256, epi16, __m256i, __mmask16, 2)
RESNET_FUSED_CHECKED_MASKED("avx512bw", _mm512, epi16, __m512i, __mmask32, 2)

#define _mm512_maskz_loadu_ps resnet_fused_maskz_loadu__mm512ps
#define _mm512_mask_storeu_ps resnet_fused_mask_storeu__mm512ps
#define _mm256_maskz_loadu_epi16 resnet_fused_maskz_loadu__mm256epi16
#define _mm256_mask_storeu_epi16 resnet_fused_mask_storeu__mm256epi16
#define _mm512_maskz_loadu_epi16 resnet_fused_maskz_loadu__mm512epi16
#define _mm512_mask_storeu_epi16 resnet_fused_mask_storeu__mm512epi16
