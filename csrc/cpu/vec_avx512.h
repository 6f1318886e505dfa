// Sixteen float lanes: AVX-512 F, BW, DQ and VL.
#pragma once

#include "cpu/half.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

struct Vec {
  typedef __m512 Reg;
  static constexpr int kWidth = 16;
  // A register tile (gemm_body.h): 14 rows of 2 vectors, 2 weights and a broadcast fill 31 of 32
  // registers.
  static constexpr int kRows = 14, kVectors = 2;
  // How it is fed: chunks of the reduction after which the next tile has its turn, steps of it in
  // an iteration of the loop, whether a step is in assembly, and whether each fetches weights.
  static constexpr int64_t kSlab = 1 << 20;
  static constexpr int kSteps = 1;
  static constexpr bool kInAssembly = false;
  static constexpr bool kFetchesEachStep = true;

  static Reg set1(float value) { return _mm512_set1_ps(value); }
  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  // c - a * b
  static Reg fnma(Reg a, Reg b, Reg c) { return _mm512_fnmadd_ps(a, b, c); }
  // vmaxps returns its second operand when either is NaN, so NaN in `value` passes.
  static Reg at_least(Reg value, Reg low) { return _mm512_max_ps(low, value); }
  // The larger of the two; NaN in either passes.
  static Reg max(Reg a, Reg b) {
    return _mm512_mask_max_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a, b);
  }

  static Reg load(const float* source) { return _mm512_loadu_ps(source); }
  static Reg load(const BFloat16* source) { return widen_bf16(load_256(source)); }
  static Reg load(const Float16* source) { return _mm512_cvtph_ps(load_256(source)); }
  // The first `count` lanes (at most kWidth); the others are zero and are not read.
  static Reg load(const float* source, int64_t count) {
    return _mm512_maskz_loadu_ps(lanes(count), source);
  }
  static Reg load(const BFloat16* source, int64_t count) {
    return widen_bf16(_mm256_maskz_loadu_epi16(lanes(count), source));
  }
  static Reg load(const Float16* source, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count), source));
  }

  static void store(float* target, Reg value) { _mm512_storeu_ps(target, value); }
  static void store(BFloat16* target, Reg value) { store_256(target, narrow_bf16(value)); }
  static void store(Float16* target, Reg value) { store_256(target, narrow_fp16(value)); }
  static void store(float* target, Reg value, int64_t count) {
    _mm512_mask_storeu_ps(target, lanes(count), value);
  }
  static void store(BFloat16* target, Reg value, int64_t count) {
    _mm256_mask_storeu_epi16(target, lanes(count), narrow_bf16(value));
  }
  static void store(Float16* target, Reg value, int64_t count) {
    _mm256_mask_storeu_epi16(target, lanes(count), narrow_fp16(value));
  }

#ifdef RESNET_FUSED_BF16_PRODUCTS
  // Lanes are pairs of bfloat16: sum + a.first * b.first + a.second * b.second.
  static Reg dot_bf16(Reg a, Reg b, Reg sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  // The 32 values of both, rounded to bfloat16.
  static Reg pair_bf16(Reg first, Reg second) {
    return reinterpret_cast<Reg>(_mm512_cvtne2ps_pbh(second, first));
  }
  // Rounded by the instruction for it, in one step instead of six (2% of ResNet-18's time at batch
  // 1, 5% of ResNet-50's); like the products, it takes subnormal numbers for zero.
  static void store_flushed(BFloat16* target, Reg value) {
    store_256(target, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
  }
  static void store_flushed(BFloat16* target, Reg value, int64_t count) {
    _mm256_mask_storeu_epi16(target, lanes(count),
                             reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
  }
  // The first `count` of 32 bfloat16 as they are; the others are zero and are not read.
  static Reg load_halves(const BFloat16* source, int64_t count) {
    const __mmask32 mask = count >= 32 ? ~__mmask32(0) : __mmask32((1u << count) - 1u);
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, source));
  }
#endif

 private:
  static __mmask16 lanes(int64_t count) {
    return count >= kWidth ? __mmask16(0xffff) : __mmask16((1u << count) - 1u);
  }
  static __m256i load_256(const void* source) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(source));
  }
  static void store_256(void* target, __m256i value) {
    _mm256_storeu_si256(static_cast<__m256i*>(target), value);
  }
  static Reg widen_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static __m256i narrow_fp16(Reg value) {
    return _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static __m256i narrow_bf16(Reg value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
  }
};

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
