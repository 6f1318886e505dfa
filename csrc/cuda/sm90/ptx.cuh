// The PTX instructions of the sm_90a kernel: mbarriers, TMA, named barriers, and small data
// movement. wgmma has a file of its own. Compiled by g++ they run in csrc/cuda/emulate.
#pragma once

#include "cuda/sm90/tensor_map.h"

#ifdef RESNET_FUSED_EMULATE
#include "cuda/emulate/sm90.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace resnet_fused::sm90 {

#define RF_DEVICE __device__ __forceinline__
#define RF_DYNAMIC_SHARED(name) extern __shared__ __align__(128) uint8_t name[]

RF_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
RF_DEVICE bool elect_one() {
  uint32_t chosen;
  asm volatile("{\n .reg .pred q;\n elect.sync _|q, 0xffffffff;\n selp.u32 %0, 1, 0, q;\n}\n"
               : "=r"(chosen));
  return chosen != 0;
}

// ---- mbarriers ----
RF_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialisation visible to TMA.
RF_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
RF_DEVICE void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
RF_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
RF_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n .reg .pred q;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 q, [%1], %2;\n"
        " selp.u32 %0, 1, 0, q;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// ---- TMA ----
RF_DEVICE void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
RF_DEVICE uint64_t keep_in_l2() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Coordinates innermost first: channel, w, h, image; the tap's offsets w, then h.
RF_DEVICE void tma_im2col(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int w, int h,
                          int n, uint16_t offset_w, uint16_t offset_h) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(offset_w), "h"(offset_h)
      : "memory");
}
RF_DEVICE void tma_tile(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int tap, int k,
                        uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(tap), "r"(k), "l"(policy)
      : "memory");
}
RF_DEVICE void tma_window(uint32_t to, const TensorMap* map, uint32_t barrier, int c, int w, int h,
                          int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}
// Stores are this thread's, in groups.
RF_DEVICE void tma_store(uint32_t from, const TensorMap* map, int c, int w, int h, int n) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(map),
      "r"(from), "r"(c), "r"(w), "r"(h), "r"(n)
      : "memory");
}
RF_DEVICE void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until they have read shared memory; until they are done.
RF_DEVICE void wait_for_stores_to_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
RF_DEVICE void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Orders this thread's plain accesses to shared memory before later ones of TMA and wgmma.
RF_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warpgroups and dependent launches ----
template <int kRegisters>
RF_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
RF_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
// Waits until the kernels before this one have ended and their stores are visible.
RF_DEVICE void wait_for_earlier_kernels() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
RF_DEVICE void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
template <int kThreads>
RF_DEVICE void group_barrier(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
// The same barrier, and whether `value` was true in any of its threads.
template <int kThreads>
RF_DEVICE bool group_any(int id, bool value) {
  uint32_t any;
  asm volatile(
      "{\n .reg .pred p, q;\n setp.ne.u32 p, %3, 0;\n"
      " bar.red.or.pred q, %1, %2, p;\n selp.u32 %0, 1, 0, q;\n}\n"
      : "=r"(any)
      : "r"(id), "n"(kThreads), "r"(uint32_t(value))
      : "memory");
  return any != 0;
}

// ---- clusters ----
// A barrier of all threads of the cluster's blocks but those that have ended. What was stored
// before an arrival is seen behind the wait.
RF_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
RF_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// 16 bytes of the shared memory of the cluster's block number `rank`, at this block's address.
RF_DEVICE float4 load_from_block(int rank, uint32_t address) {
  float4 v;
  asm volatile(
      "{\n .reg .u32 there;\n"
      " mapa.shared::cluster.u32 there, %4, %5;\n"
      " ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [there];\n}\n"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank));
  return v;
}

// ---- small data movement ----
RF_DEVICE uint32_t transpose_8x8(uint32_t a) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
// Four 8 x 8 matrices of 16-bit values, or with kHalf two, whose rows are where the lanes say.
template <bool kTransposed, bool kHalf>
RF_DEVICE void load_matrices(uint32_t (&w)[4], uint32_t row) {
#define RF_LOAD(TRANS)                                                                    \
  if constexpr (kHalf)                                                                    \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" TRANS ".shared.b16 {%0,%1}, [%2];"       \
                 : "=r"(w[0]), "=r"(w[1])                                                 \
                 : "r"(row)                                                               \
                 : "memory");                                                             \
  else                                                                                    \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" TRANS ".shared.b16 {%0,%1,%2,%3}, [%4];" \
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])                         \
                 : "r"(row)                                                               \
                 : "memory");
  if constexpr (kTransposed) {
    RF_LOAD(".trans")
  } else {
    RF_LOAD("")
  }
#undef RF_LOAD
}
template <bool kTransposed, bool kHalf>
RF_DEVICE void store_matrices(uint32_t row, const uint32_t (&w)[4]) {
#define RF_STORE(TRANS)                                                                         \
  if constexpr (kHalf)                                                                          \
    asm volatile("stmatrix.sync.aligned.m8n8.x2" TRANS ".shared.b16 [%0], {%1,%2};" ::"r"(row), \
                 "r"(w[0]), "r"(w[1])                                                           \
                 : "memory");                                                                   \
  else                                                                                          \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" TRANS                                          \
                 ".shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(row),                                 \
                 "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3])                                     \
                 : "memory");
  if constexpr (kTransposed) {
    RF_STORE(".trans")
  } else {
    RF_STORE("")
  }
#undef RF_STORE
}
RF_DEVICE float relu_keeping_nan(float v) {
  float r;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(v));
  return r;
}
// Not by the non-coherent path, which is for what nobody writes while the kernel lives: the kernel
// before may not have ended when this one begins. Nor may the other loads be __ldg.
RF_DEVICE uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
RF_DEVICE void store_16(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

}  // namespace resnet_fused::sm90
#endif

namespace resnet_fused::sm90 {

// Two values of type T in a 32-bit word, the first in its low half.
template <typename T>
struct Pair;
template <>
struct Pair<__half> {
  static RF_DEVICE uint32_t pack(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static RF_DEVICE float2 unpack(uint32_t word) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
};
template <>
struct Pair<__nv_bfloat16> {
  static RF_DEVICE uint32_t pack(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  static RF_DEVICE float2 unpack(uint32_t word) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&word));
  }
};

}  // namespace resnet_fused::sm90
