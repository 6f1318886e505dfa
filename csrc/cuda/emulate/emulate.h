// Execute CUDA kernel bodies on the CPU, for tests: what a kernel's source sees of it.
//
// Every CUDA thread is a fiber; all blocks that fit run together on one OS thread, in an order that
// Options chooses. The kernel's translation unit is compiled with -DRESNET_FUSED_EMULATE
// -fsanitize=thread and linked WITHOUT gcc's runtime for it: hooks.cpp supplies the functions that
// the compiler calls, so that every plain load and store of the kernel is seen, with no change in
// its source. The emulator's own files are compiled without.
//
// Reported, with block, thread and the last source line that called a primitive: shared or global
// access out of bounds or misaligned; shared bytes read before they are written; conflicting shared
// accesses without a barrier between (vector clocks, by warp); words of global memory read by
// another block or warp without fence and atomic between; divergent barriers and warp collectives;
// deadlock; an output element stored twice. Device buffers start as NaN, between red zones.
//
// Not modelled: rounding and order inside the tensor cores (float32, in order, here), bank
// conflicts of other accesses than ldmatrix, registers, occupancy, time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <functional>
#include <string>

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#define EMU_LINE int line = __builtin_LINE()

extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

struct Options {
  // What goes first where several could go on: 0 the lowest warp and the oldest copy, 1 the highest
  // and the newest, 2 random (seeded, the same every time).
  int order = 0;
  int resident = 4;  // blocks at a time
  int cluster = 1;   // blocks of a cluster
  uint32_t seed = 1;
  bool race = true, uninit = true;
  bool async = false;  // the kernel uses TMA or wgmma: async.h
};
struct Stats {
  uint64_t mma, barriers, switches;
  uint64_t bank_conflicts;  // of ldmatrix
};
struct Result {
  std::string error;  // empty: the launch completed
  Stats stats;
};
Result launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body,
              Options options = {});

// Device buffers. Dependent: an earlier kernel may still use it until griddepcontrol.wait. Shared:
// blocks hand data to each other through it.
enum { kReadOnly = 1, kWriteOnce = 2, kDependent = 4, kShared = 8 };
void* dev_alloc(size_t bytes, const char* name, int flags);
void dev_reset();

using Exec = void (*)(void* const* args, uint32_t mask);  // run once per warp, args[lane]
void collective(Exec exec, const char* op, uint32_t mask, void* arg, int line);
void barrier(int id, int count, int line);  // count 0: the whole block
int lane();
unsigned char* dyn_smem();
uint32_t smem_u32(const void* p);
enum Mma { kF16, kBF16, kTF32 };
struct Shfl {
  uint64_t in, out;
  int source;
};
void shfl_exec(void* const*, uint32_t);
void ballot_exec(void* const*, uint32_t);
void none_exec(void* const*, uint32_t);
void fence();
unsigned atomic_add(unsigned* p, unsigned v);
template <class T>
T shfl(unsigned mask, T v, int source, int line) {
  static_assert(sizeof(T) <= 8);
  Shfl s{0, 0, source};
  __builtin_memcpy(&s.in, &v, sizeof v);
  collective(shfl_exec, "shfl", mask, &s, line);
  __builtin_memcpy(&v, &s.out, sizeof v);
  return v;
}

}  // namespace emu

inline void __syncthreads(EMU_LINE) { emu::barrier(0, 0, line); }
inline void __syncwarp(unsigned mask = ~0u, EMU_LINE) {
  emu::collective(emu::none_exec, "__syncwarp", mask, nullptr, line);
}
inline void __threadfence() { emu::fence(); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, T v) {
  *p = v;
}
template <class T, class U>
T atomicAdd(T* p, U v) {
  return emu::atomic_add(p, T(v));
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMU_LINE) {
  return emu::shfl(mask, v, (emu::lane() & -width) | (source & (width - 1)), line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, EMU_LINE) {
  const int l = emu::lane(), s = l ^ x;
  return emu::shfl(mask, v, s < (l & -width) + width ? s : l, line);
}
inline unsigned __ballot_sync(unsigned mask, bool p, EMU_LINE) {
  emu::Shfl s{p, 0, 0};
  emu::collective(emu::ballot_exec, "ballot", mask, &s, line);
  return unsigned(s.out);
}
