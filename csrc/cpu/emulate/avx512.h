// The AVX-512 instructions that our kernels use, for a CPU with AVX2: `EMULATE_AVX512=1 setup.py`
// includes this file first everywhere, so that `make avx512-check` can run vec_avx512.h and all
// that is written over it where there is no AVX-512. Same results, many times slower.
//
// Masked accesses touch no lane that is off, so that a tail that reads or writes too far does so
// here too. An intrinsic that is missing below does not compile: the compiler says "target specific
// option mismatch".
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// The types exist whatever the target; passed between functions they would break an ABI that
// nobody else shares.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")

#define RESNET_FUSED_EMULATED static inline __attribute__((always_inline))

namespace resnet_fused::emulated {

template <typename To, typename From>
RESNET_FUSED_EMULATED To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- whole registers, as two halves or by the compiler's own vectors

struct Halves {
  __m256 low, high;
};

RESNET_FUSED_EMULATED __m512 join(__m256 low, __m256 high) { return as<__m512>(Halves{low, high}); }

RESNET_FUSED_EMULATED __m512 set1_ps(float value) {
  return join(_mm256_set1_ps(value), _mm256_set1_ps(value));
}
RESNET_FUSED_EMULATED __m512 add_ps(__m512 a, __m512 b) { return a + b; }
RESNET_FUSED_EMULATED __m512 sub_ps(__m512 a, __m512 b) { return a - b; }
RESNET_FUSED_EMULATED __m512 mul_ps(__m512 a, __m512 b) { return a * b; }
RESNET_FUSED_EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const Halves x = as<Halves>(a), y = as<Halves>(b), z = as<Halves>(c);
  return join(_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high));
}
RESNET_FUSED_EMULATED __m512 fnmadd_ps(__m512 a, __m512 b, __m512 c) { return fmadd_ps(-a, b, c); }
RESNET_FUSED_EMULATED __m512 max_ps(__m512 a, __m512 b) {
  const Halves x = as<Halves>(a), y = as<Halves>(b);
  return join(_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high));
}
RESNET_FUSED_EMULATED __m512 loadu_ps(const void* source) {
  const auto* at = static_cast<const float*>(source);
  return join(_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8));
}
RESNET_FUSED_EMULATED void storeu_ps(void* target, __m512 value) {
  std::memcpy(target, &value, sizeof(value));
}
RESNET_FUSED_EMULATED __m512 cvtph_ps(__m256i value) {
  return join(_mm256_cvtph_ps(_mm256_castsi256_si128(value)),
              _mm256_cvtph_ps(_mm256_extracti128_si256(value, 1)));
}
template <int kRounding>
RESNET_FUSED_EMULATED __m256i cvtps_ph(__m512 value) {
  const Halves x = as<Halves>(value);
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, kRounding), _mm256_cvtps_ph(x.low, kRounding));
}

// ---- lane by lane

template <int kCount, typename Element>
struct Lanes {
  Element at[kCount];
};
typedef Lanes<16, float> Floats;
typedef Lanes<16, uint32_t> Words;
typedef Lanes<16, uint16_t> Shorts;

template <typename Reg, typename Function>
RESNET_FUSED_EMULATED __m512i each_word(Reg value, const Function& function) {
  Words words = as<Words>(value);
  for (int i = 0; i < 16; ++i) words.at[i] = function(words.at[i], i);
  return as<__m512i>(words);
}

RESNET_FUSED_EMULATED __m512i set1_epi32(int value) {
  return each_word(__m512i{}, [=](uint32_t, int) { return static_cast<uint32_t>(value); });
}
RESNET_FUSED_EMULATED __m512i and_si512(__m512i a, __m512i b) { return a & b; }
RESNET_FUSED_EMULATED __m512i add_epi32(__m512i a, __m512i b) {
  const Words right = as<Words>(b);
  return each_word(a, [&](uint32_t word, int i) { return word + right.at[i]; });
}
RESNET_FUSED_EMULATED __m512i slli_epi32(__m512i a, unsigned count) {
  return each_word(a, [=](uint32_t word, int) { return word << count; });
}
RESNET_FUSED_EMULATED __m512i srli_epi32(__m512i a, unsigned count) {
  return each_word(a, [=](uint32_t word, int) { return word >> count; });
}
RESNET_FUSED_EMULATED __m512i mask_mov_epi32(__m512i other, __mmask16 mask, __m512i value) {
  const Words on = as<Words>(value);
  return each_word(other, [&](uint32_t word, int i) { return mask >> i & 1 ? on.at[i] : word; });
}
RESNET_FUSED_EMULATED __m512i cvtepu16_epi32(__m256i value) {
  const Shorts shorts = as<Shorts>(value);
  return each_word(__m512i{}, [&](uint32_t, int i) { return shorts.at[i]; });
}
RESNET_FUSED_EMULATED __m256i cvtepi32_epi16(__m512i value) {
  const Words words = as<Words>(value);
  Shorts shorts;
  for (int i = 0; i < 16; ++i) shorts.at[i] = static_cast<uint16_t>(words.at[i]);
  return as<__m256i>(shorts);
}

template <int kPredicate>
RESNET_FUSED_EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  const Halves x = as<Halves>(a), y = as<Halves>(b);
  return static_cast<__mmask16>(_mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, kPredicate)) |
                                _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, kPredicate)) << 8);
}
RESNET_FUSED_EMULATED __m512 mask_max_ps(__m512 other, __mmask16 mask, __m512 a, __m512 b) {
  return as<__m512>(mask_mov_epi32(as<__m512i>(other), mask, as<__m512i>(max_ps(a, b))));
}

template <typename Element, typename Reg>
RESNET_FUSED_EMULATED Reg maskz_loadu(uint32_t mask, const void* source) {
  constexpr int kCount = sizeof(Reg) / sizeof(Element);
  Lanes<kCount, Element> lanes{};
  for (int i = 0; i < kCount; ++i) {
    if (mask >> i & 1) lanes.at[i] = static_cast<const Element*>(source)[i];
  }
  return as<Reg>(lanes);
}
template <typename Element, typename Reg>
RESNET_FUSED_EMULATED void mask_storeu(void* target, uint32_t mask, Reg value) {
  constexpr int kCount = sizeof(Reg) / sizeof(Element);
  const auto lanes = as<Lanes<kCount, Element>>(value);
  for (int i = 0; i < kCount; ++i) {
    if (mask >> i & 1) static_cast<Element*>(target)[i] = lanes.at[i];
  }
}

// ---- AVX512-BF16: subnormal numbers are read and written as zero

RESNET_FUSED_EMULATED float flush(float value) {
  return std::fabs(value) < 0x1p-126f ? std::copysign(0.0f, value) : value;
}
RESNET_FUSED_EMULATED float widen(uint32_t bits) { return flush(as<float>(bits << 16)); }

// To the nearest, ties to even; NaN becomes quiet.
RESNET_FUSED_EMULATED uint16_t narrow(float value) {
  const uint32_t bits = as<uint32_t>(flush(value));
  const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
  return static_cast<uint16_t>(value == value ? rounded >> 16 : bits >> 16 | 0x40);
}

// The pair's second product is added first; neither is rounded before it is added.
RESNET_FUSED_EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Words left = as<Words>(a), right = as<Words>(b);
  Floats sums = as<Floats>(sum);
  for (int i = 0; i < 16; ++i) {
    const float second =
        __builtin_fmaf(widen(left.at[i] >> 16), widen(right.at[i] >> 16), flush(sums.at[i]));
    sums.at[i] = flush(
        __builtin_fmaf(widen(left.at[i] & 0xffff), widen(right.at[i] & 0xffff), flush(second)));
  }
  return as<__m512>(sums);
}
RESNET_FUSED_EMULATED __m256bh cvtneps_pbh(__m512 value) {
  const Floats floats = as<Floats>(value);
  Shorts shorts;
  for (int i = 0; i < 16; ++i) shorts.at[i] = narrow(floats.at[i]);
  return as<__m256bh>(shorts);
}
RESNET_FUSED_EMULATED __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  struct Both {
    __m256bh low, high;
  };
  return as<__m512bh>(Both{cvtneps_pbh(low), cvtneps_pbh(high)});
}

// ---- the CPU that the kernels believe to be on

static inline bool cpu_supports(const char* feature) {
  return std::strncmp(feature, "avx512", 6) == 0 ||
         (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
          __builtin_cpu_supports("f16c"));
}

}  // namespace resnet_fused::emulated

#pragma GCC pop_options

#define RESNET_FUSED_EMULATED_AVX512
#define RESNET_FUSED_VECTOR_OPERAND "m"
#define __builtin_cpu_supports(feature) resnet_fused::emulated::cpu_supports(feature)

#define _mm512_add_epi32 resnet_fused::emulated::add_epi32
#define _mm512_add_ps resnet_fused::emulated::add_ps
#define _mm512_and_si512 resnet_fused::emulated::and_si512
#define _mm512_castps_si512 resnet_fused::emulated::as<__m512i, __m512>
#define _mm512_castsi512_ps resnet_fused::emulated::as<__m512, __m512i>
#define _mm512_cvtepi32_epi16 resnet_fused::emulated::cvtepi32_epi16
#define _mm512_cvtepu16_epi32 resnet_fused::emulated::cvtepu16_epi32
#define _mm512_cvtne2ps_pbh resnet_fused::emulated::cvtne2ps_pbh
#define _mm512_cvtneps_pbh resnet_fused::emulated::cvtneps_pbh
#define _mm512_cvtph_ps resnet_fused::emulated::cvtph_ps
#define _mm512_dpbf16_ps resnet_fused::emulated::dpbf16_ps
#define _mm512_fmadd_ps resnet_fused::emulated::fmadd_ps
#define _mm512_fnmadd_ps resnet_fused::emulated::fnmadd_ps
#define _mm512_loadu_ps resnet_fused::emulated::loadu_ps
#define _mm512_mask_max_ps resnet_fused::emulated::mask_max_ps
#define _mm512_mask_mov_epi32 resnet_fused::emulated::mask_mov_epi32
#define _mm512_max_ps resnet_fused::emulated::max_ps
#define _mm512_mul_ps resnet_fused::emulated::mul_ps
#define _mm512_set1_epi32 resnet_fused::emulated::set1_epi32
#define _mm512_set1_ps resnet_fused::emulated::set1_ps
#define _mm512_slli_epi32 resnet_fused::emulated::slli_epi32
#define _mm512_srli_epi32 resnet_fused::emulated::srli_epi32
#define _mm512_storeu_ps resnet_fused::emulated::storeu_ps
#define _mm512_sub_ps resnet_fused::emulated::sub_ps

#define _mm512_maskz_loadu_ps resnet_fused::emulated::maskz_loadu<float, __m512>
#define _mm512_maskz_loadu_epi16 resnet_fused::emulated::maskz_loadu<uint16_t, __m512i>
#define _mm256_maskz_loadu_epi16 resnet_fused::emulated::maskz_loadu<uint16_t, __m256i>
#define _mm512_mask_storeu_ps resnet_fused::emulated::mask_storeu<float, __m512>
#define _mm256_mask_storeu_epi16 resnet_fused::emulated::mask_storeu<uint16_t, __m256i>

// Those that take an immediate, and the one without arguments.
#define _mm512_cmp_ps_mask(a, b, predicate) resnet_fused::emulated::cmp_ps_mask<predicate>(a, b)
#define _mm512_cvtps_ph(value, rounding) resnet_fused::emulated::cvtps_ph<rounding>(value)
#define _mm512_setzero_ps() resnet_fused::emulated::set1_ps(0.0f)
