// The instructions that the sm_80 kernel uses: real ones under nvcc, emulated ones under g++.
#pragma once

#include "cuda/sm80/tiles.h"

#if defined(RESNET_FUSED_EMULATE)
#include "cuda/emulate/sm80.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define RF_DEVICE __device__ __forceinline__
#define RF_DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint8_t name[]

namespace resnet_fused::sm80 {

RF_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Starts a copy of 16 bytes to shared memory; where not `in`, zeros, and nothing is read.
RF_DEVICE void copy_16(uint32_t to, const void* from, bool in) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(in ? 16 : 0)
               : "memory");
}
// Of the 16 only the first `bytes` are read; zeros behind them.
RF_DEVICE void copy_part_of_16(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from),
               "r"(bytes)
               : "memory");
}
RF_DEVICE void copy_4(uint32_t to, const void* from, bool in) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(to), "l"(from),
               "r"(in ? 4 : 0)
               : "memory");
}
RF_DEVICE void copies_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most `kPending` of this thread's committed groups have not landed.
template <int kPending>
RF_DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}
// Asks for the 128 bytes around an address to be brought to L2.
RF_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p)); }
// Four 8 x 8 matrices of 16-bit elements, or 8 x 4 of 32-bit ones; lane l gives the address of row
// l % 8 of matrix l / 8, and receives row l / 4, word l % 4 of each.
RF_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// d += a * b, 16 x 8 outputs; 32 bytes of the reduction.
RF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
RF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
RF_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, float) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The multiplier would cut float32 off; rounding halves that error and has no bias.
RF_DEVICE uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}
RF_DEVICE float relu_keeping_nan(float v) {
  float r;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(v));
  return r;
}
// Two elements at a time.
RF_DEVICE uint32_t max_keeping_nan(uint32_t a, uint32_t b, __half) {
  uint32_t r;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
RF_DEVICE uint32_t max_keeping_nan(uint32_t a, uint32_t b, __nv_bfloat16) {
  uint32_t r;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

}  // namespace resnet_fused::sm80
#endif

namespace resnet_fused::sm80 {

RF_DEVICE uint32_t minus_infinities(__half) { return 0xfc00fc00u; }
RF_DEVICE uint32_t minus_infinities(__nv_bfloat16) { return 0xff80ff80u; }
// A pair of the exponent's lowest bits: what makes an exponent of ones overflow.
RF_DEVICE uint32_t smallest_exponents(__half) { return 0x04000400u; }
RF_DEVICE uint32_t smallest_exponents(__nv_bfloat16) { return 0x00800080u; }

// Two elements as one word, `low` in its lower half.
RF_DEVICE uint32_t pack(float low, float high, __half) {
  const __half2 both = __floats2half2_rn(low, high);
  uint32_t bits;
  __builtin_memcpy(&bits, &both, 4);
  return bits;
}
RF_DEVICE uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  __builtin_memcpy(&bits, &both, 4);
  return bits;
}

template <typename T>
RF_DEVICE float to_float(T v);
template <>
RF_DEVICE float to_float(float v) {
  return v;
}
template <>
RF_DEVICE float to_float(__half v) {
  return __half2float(v);
}
template <>
RF_DEVICE float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
template <typename T>
RF_DEVICE T from_float(float v);
template <>
RF_DEVICE float from_float(float v) {
  return v;
}
template <>
RF_DEVICE __half from_float(float v) {
  return __float2half_rn(v);
}
template <>
RF_DEVICE __nv_bfloat16 from_float(float v) {
  return __float2bfloat16_rn(v);
}

}  // namespace resnet_fused::sm80
