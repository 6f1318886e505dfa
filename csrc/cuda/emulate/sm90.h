// The sm_90a instructions of csrc/cuda/sm90, emulated: what the kernel's source sees when g++
// compiles it. See async.h for what is checked.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/emulate/emulate.h"
#include "cuda/sm90/tensor_map.h"

#define RF_DEVICE inline
#define RF_DYNAMIC_SHARED(name) uint8_t* const name = emu::dyn_smem()
#define RF_LINE int line = __builtin_LINE()

namespace emu {

void mbarrier_init(uint32_t address, uint32_t arrivals, int line);
void mbarrier_init_fence();
void mbarrier_arrive(uint32_t address, uint32_t bytes, int line);  // bytes: expected besides
void mbarrier_wait(uint32_t address, uint32_t parity, int line);
void tma_im2col(uint32_t to, const resnet_fused::sm90::MapFields& map, uint32_t barrier,
                const int (&at)[4], int offset_w, int offset_h, int line);
void tma_tile(uint32_t to, const resnet_fused::sm90::MapFields& map, uint32_t barrier,
              const int (&at)[4], int line);
void async_proxy_fence();
void set_registers(int count, bool more, int line);
void grid_dependency_wait();
void group_barrier(int id, int threads, int line);
bool group_any(int id, int threads, bool value, int line);
bool elect(int line);
void cluster_arrive(int line);
void cluster_wait(int line);
void load_from_block(int rank, uint32_t address, void* to, int bytes, int line);
uint32_t movmatrix(uint32_t word, int line);
void load_matrices(uint32_t* words, uint32_t row, bool transposed, int count, int line);
void store_matrices(const uint32_t* words, uint32_t row, bool transposed, int count, int line);
void tma_store(uint32_t from, const resnet_fused::sm90::MapFields& map, const int (&at)[4],
               int line);
void commit_stores();
void wait_for_stores(int line);
void wgmma(Mma kind, int n, float* d, uint64_t a, uint64_t b, bool keep, int line);
void wgmma_fence(int line);
void wgmma_commit(int line);
void wgmma_wait(int pending, int line);
inline Mma kind_of(__half) { return kF16; }
inline Mma kind_of(__nv_bfloat16) { return kBF16; }

}  // namespace emu

namespace resnet_fused::sm90 {

using std::max;
using std::min;

inline uint32_t shared_address(const void* p) { return emu::smem_u32(p); }
inline bool elect_one(RF_LINE) { return emu::elect(line); }
inline void barrier_init(uint32_t barrier, uint32_t arrivals, RF_LINE) {
  emu::mbarrier_init(barrier, arrivals, line);
}
inline void barrier_init_fence() { emu::mbarrier_init_fence(); }
inline void barrier_expect(uint32_t barrier, uint32_t bytes, RF_LINE) {
  emu::mbarrier_arrive(barrier, bytes, line);
}
inline void barrier_arrive(uint32_t barrier, RF_LINE) { emu::mbarrier_arrive(barrier, 0, line); }
inline void barrier_wait(uint32_t barrier, uint32_t parity, RF_LINE) {
  emu::mbarrier_wait(barrier, parity, line);
}
inline void prefetch_map(const TensorMap*) {}
inline uint64_t keep_in_l2() { return 0; }
inline void tma_im2col(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int w, int h,
                       int n, uint16_t offset_w, uint16_t offset_h, RF_LINE) {
  emu::tma_im2col(to, *map, barrier, {c, w, h, n}, offset_w, offset_h, line);
}
inline void tma_tile(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int tap, int k,
                     uint64_t, RF_LINE) {
  emu::tma_tile(to, *map, barrier, {c, tap, k, 0}, line);
}
inline void tma_window(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int w, int h,
                       int n, RF_LINE) {
  emu::tma_tile(to, *map, barrier, {c, w, h, n}, line);
}
inline void async_proxy_fence() { emu::async_proxy_fence(); }
template <int kRegisters>
void give_registers(RF_LINE) {
  emu::set_registers(kRegisters, false, line);
}
template <int kRegisters>
void take_registers(RF_LINE) {
  emu::set_registers(kRegisters, true, line);
}
inline void wait_for_earlier_kernels() { emu::grid_dependency_wait(); }
inline void let_next_kernel_start() {}
template <int kThreads>
void group_barrier(int id, RF_LINE) {
  emu::group_barrier(id, kThreads, line);
}
template <int kThreads>
bool group_any(int id, bool value, RF_LINE) {
  return emu::group_any(id, kThreads, value, line);
}
inline void cluster_arrive(RF_LINE) { emu::cluster_arrive(line); }
inline void cluster_wait(RF_LINE) { emu::cluster_wait(line); }
inline float4 load_from_block(int rank, uint32_t address, RF_LINE) {
  float4 v;
  emu::load_from_block(rank, address, &v, sizeof v, line);
  return v;
}
inline uint32_t transpose_8x8(uint32_t a, RF_LINE) { return emu::movmatrix(a, line); }
template <bool kTransposed, bool kHalf>
void load_matrices(uint32_t (&w)[4], uint32_t row, RF_LINE) {
  emu::load_matrices(w, row, kTransposed, kHalf ? 2 : 4, line);
}
template <bool kTransposed, bool kHalf>
void store_matrices(uint32_t row, const uint32_t (&w)[4], RF_LINE) {
  emu::store_matrices(w, row, kTransposed, kHalf ? 2 : 4, line);
}
inline void tma_store(uint32_t from, const TensorMap* map, int c, int w, int h, int n, RF_LINE) {
  emu::tma_store(from, *map, {c, w, h, n}, line);
}
inline void commit_stores() { emu::commit_stores(); }
inline void wait_for_stores_to_read(RF_LINE) { emu::wait_for_stores(line); }
inline void wait_for_stores(RF_LINE) { emu::wait_for_stores(line); }
inline float relu_keeping_nan(float v) { return v < 0.f ? 0.f : v; }
inline uint4 load_once(const void* p) { return *static_cast<const uint4*>(p); }
inline void store_16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

}  // namespace resnet_fused::sm90
