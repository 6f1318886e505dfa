// The chains of peak.h in bfloat16 products, compiled for AVX-512 BF16.
#include <immintrin.h>

#include "cpu/peak.h"

// gcc 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bf16")

namespace resnet_fused {

float multiply_chains_bf16(int64_t steps) {
  // Pairs of 1 and -1: every product counts, and no sum runs off to infinity.
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f80bf80);
  const __m512bh b = (__m512bh)_mm512_set1_epi32(0x3f803f80);
  __m512 sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
  }
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  return _mm512_cvtss_f32(sum[0]);
}

}  // namespace resnet_fused
