// The sm_80 instructions of csrc/cuda/sm80, emulated: what the kernel's source sees when g++
// compiles it.
//
// A cp.async fills its destination with NaN, and the bytes arrive at the issuing thread's wait for
// their group; until then nobody may touch them, and after it other threads only behind a barrier.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/emulate/emulate.h"

#define RF_DEVICE inline
#define RF_DYNAMIC_SHARED(name) uint8_t* const name = emu::dyn_smem()
#define RF_LINE int line = __builtin_LINE()

namespace emu {

// Reads `source` bytes, 0 or more; zeros behind them.
void copy_async(uint32_t to, const void* from, int bytes, int source, int line);
void copies_commit();
void copies_wait(int pending);
void ldmatrix(uint32_t (&r)[4], uint32_t address, int line);
void mma(Mma kind, float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, int line);

}  // namespace emu

inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
}

namespace resnet_fused::sm80 {

inline uint32_t shared_address(const void* p) { return emu::smem_u32(p); }
inline void copy_16(uint32_t to, const void* from, bool in, RF_LINE) {
  emu::copy_async(to, from, 16, in ? 16 : 0, line);
}
inline void copy_4(uint32_t to, const void* from, bool in, RF_LINE) {
  emu::copy_async(to, from, 4, in ? 4 : 0, line);
}
inline void copy_part_of_16(uint32_t to, const void* from, int bytes, RF_LINE) {
  emu::copy_async(to, from, 16, bytes, line);
}
// The address must be one that could be read.
inline void prefetch(const void* p) { *static_cast<const volatile uint8_t*>(p); }
inline void copies_commit() { emu::copies_commit(); }
template <int kPending>
void copies_wait() {
  emu::copies_wait(kPending);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t address, RF_LINE) {
  emu::ldmatrix(r, address, line);
}
inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, __half, RF_LINE) {
  emu::mma(emu::kF16, d, a, b, line);
}
inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, __nv_bfloat16,
                     RF_LINE) {
  emu::mma(emu::kBF16, d, a, b, line);
}
inline void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, float, RF_LINE) {
  emu::mma(emu::kTF32, d, a, b, line);
}
// To nearest, ties away from zero, 10 bits behind the point; NaN and Inf stay what they are.
inline uint32_t round_to_tf32(uint32_t bits) {
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}
inline float relu_keeping_nan(float v) { return v < 0.f ? 0.f : v; }
// Two elements at a time; NaN comes out as PTX's own.
template <typename T>
uint32_t max_keeping_nan(uint32_t a, uint32_t b, T) {
  uint32_t both = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const uint16_t bits[2] = {uint16_t(a >> shift), uint16_t(b >> shift)};
    T v[2];
    __builtin_memcpy(v, bits, 4);
    const float left = float(v[0]), right = float(v[1]);
    const bool nan = left != left || right != right;
    both |= uint32_t(nan ? 0x7fff : left < right ? bits[1] : bits[0]) << shift;
  }
  return both;
}

}  // namespace resnet_fused::sm80
