// Eight float lanes: AVX2, FMA and F16C.
#pragma once

#include "cpu/half.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

struct Vec {
  typedef __m256 Reg;
  static constexpr int kWidth = 8;
  // A register tile (gemm_body.h): 3 rows of 4 vectors, the weights of 3 of which are loaded, and a
  // broadcast fill all 16 registers.
  static constexpr int kRows = 3, kVectors = 4;
  // How it is fed: chunks of the reduction after which the next tile has its turn, steps of it in
  // an iteration of the loop, whether a step is in assembly, and whether each fetches weights.
  static constexpr int64_t kSlab = 8;
  static constexpr int kSteps = 4;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  static constexpr bool kInAssembly = false;  // whose loads they do not see
#else
  static constexpr bool kInAssembly = true;
#endif
  static constexpr bool kFetchesEachStep = false;

  static Reg set1(float value) { return _mm256_set1_ps(value); }
  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  // c - a * b
  static Reg fnma(Reg a, Reg b, Reg c) { return _mm256_fnmadd_ps(a, b, c); }
  // vmaxps returns its second operand when either is NaN, so NaN in `value` passes.
  static Reg at_least(Reg value, Reg low) { return _mm256_max_ps(low, value); }
  // The larger of the two; NaN in either passes.
  static Reg max(Reg a, Reg b) {
    return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }

  static Reg load(const float* source) { return _mm256_loadu_ps(source); }
  static Reg load(const BFloat16* source) { return widen_bf16(load_128(source)); }
  static Reg load(const Float16* source) { return _mm256_cvtph_ps(load_128(source)); }
  // The first `count` lanes (at most kWidth); the others are zero and are not read.
  static Reg load(const float* source, int64_t count) {
    return _mm256_maskload_ps(source, lanes(count));
  }
  template <typename T>
  static Reg load(const T* source, int64_t count) {
    T padded[kWidth] = {};
    for (int64_t i = 0; i < count && i < kWidth; ++i) padded[i] = source[i];
    return load(padded);
  }

  static void store(float* target, Reg value) { _mm256_storeu_ps(target, value); }
  static void store(BFloat16* target, Reg value) { store_128(target, narrow_bf16(value)); }
  static void store(Float16* target, Reg value) {
    store_128(target, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(float* target, Reg value, int64_t count) {
    _mm256_maskstore_ps(target, lanes(count), value);
  }
  template <typename T>
  static void store(T* target, Reg value, int64_t count) {
    T padded[kWidth];
    store(padded, value);
    for (int64_t i = 0; i < count && i < kWidth; ++i) target[i] = padded[i];
  }

  // The weights of a step of the reduction but for the first vector, which stays in memory: no
  // register is left for it.
  typedef Reg Weights[kVectors - 1];
  // In assembly, and in this order, because gcc 12 moves loads ahead of their use and, out of
  // registers, sums from one to another.
  static inline __attribute__((always_inline)) void load_weights(const float* panel,
                                                                 Weights& weights) {
#pragma GCC unroll 4
    for (int v = 1; v < kVectors; ++v) {
      __asm__ volatile("vmovups %1, %0"
                       : "=x"(weights[v - 1])
                       : "m"(vector_at(panel + v * kWidth)));
    }
  }
  // sum[v] += *value * vector v of the weights at `panel`.
  static inline __attribute__((always_inline)) void multiply_row(Reg (&sum)[kVectors],
                                                                 const float* value,
                                                                 const float* panel,
                                                                 const Weights& weights) {
    Reg broadcast;
    __asm__ volatile(
        "vbroadcastss %5, %4\n\t"
        "vfmadd231ps %6, %4, %0\n\t"
        "vfmadd231ps %7, %4, %1\n\t"
        "vfmadd231ps %8, %4, %2\n\t"
        "vfmadd231ps %9, %4, %3"
        : "+&x"(sum[0]), "+&x"(sum[1]), "+&x"(sum[2]), "+&x"(sum[3]), "=&x"(broadcast)
        : "m"(*value), "m"(vector_at(panel)), "x"(weights[0]), "x"(weights[1]), "x"(weights[2]));
  }

 private:
  static __m256i lanes(int64_t count) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
  }
  static const __m256_u& vector_at(const float* source) {
    return *reinterpret_cast<const __m256_u*>(source);
  }
  static __m128i load_128(const void* source) {
    return _mm_loadu_si128(static_cast<const __m128i*>(source));
  }
  static void store_128(void* target, __m128i value) {
    _mm_storeu_si128(static_cast<__m128i*>(target), value);
  }
  static Reg widen_bf16(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static __m128i narrow_bf16(Reg value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_packus_epi32(result, result);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
};

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
