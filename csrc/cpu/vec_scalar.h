// Four float lanes in the baseline instruction set (SSE2 on x86-64, no FMA).
#pragma once

#include "cpu/half.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

struct Vec {
  typedef float Reg __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static constexpr int kRows = 6, kVectors = 2;  // of a register tile (gemm_body.h)
  // How it is fed: chunks of the reduction after which the next tile has its turn, steps of it in
  // an iteration of the loop, whether a step is in assembly, and whether each fetches weights.
  static constexpr int64_t kSlab = 8;
  static constexpr int kSteps = 1;
  static constexpr bool kInAssembly = false;
  static constexpr bool kFetchesEachStep = false;

  static Reg set1(float value) { return Reg{value, value, value, value}; }
  static Reg zero() { return set1(0.0f); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  // c - a * b
  static Reg fnma(Reg a, Reg b, Reg c) { return c - a * b; }
  // The larger of the two; NaN in `value` passes.
  static Reg at_least(Reg value, Reg low) {
    Reg result;
    for (int i = 0; i < kWidth; ++i) result[i] = value[i] < low[i] ? low[i] : value[i];
    return result;
  }
  // The larger of the two; NaN in either passes.
  static Reg max(Reg a, Reg b) {
    Reg result;
    for (int i = 0; i < kWidth; ++i) result[i] = a[i] > b[i] || a[i] != a[i] ? a[i] : b[i];
    return result;
  }

  template <typename T>
  static Reg load(const T* source) {
    return load(source, kWidth);
  }
  // The first `count` lanes (at most kWidth); the others are zero and are not read.
  template <typename T>
  static Reg load(const T* source, int64_t count) {
    Reg result = zero();
    for (int i = 0; i < kWidth && i < count; ++i) result[i] = to_float(source[i]);
    return result;
  }
  static Reg load(const float* source) {
    Reg result;
    std::memcpy(&result, source, sizeof result);
    return result;
  }
  template <typename T>
  static void store(T* target, Reg value) {
    store(target, value, kWidth);
  }
  template <typename T>
  static void store(T* target, Reg value, int64_t count) {
    for (int i = 0; i < kWidth && i < count; ++i) target[i] = from_float<T>(value[i]);
  }
  static void store(float* target, Reg value) { std::memcpy(target, &value, sizeof value); }
};

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
