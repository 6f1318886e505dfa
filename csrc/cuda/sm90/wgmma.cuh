// wgmma: d (64 x N, float32, spread over a warpgroup) = a * b + (keep ? d : 0), both operands in
// shared memory, 16 elements of the reduction at a time. Asynchronous: between the issue and the
// wait that covers it the accumulators belong to the tensor cores, and so does the shared memory.
#pragma once

#include "cuda/sm90/ptx.cuh"

namespace resnet_fused::sm90 {

template <typename T, int kN>
struct Wgmma;

#ifdef RESNET_FUSED_EMULATE
template <typename T, int kN>
struct Wgmma {
  static void issue(float (&d)[kN / 2], uint64_t a, uint64_t b, bool keep,
                    int line = __builtin_LINE()) {
    emu::wgmma(emu::kind_of(T()), kN, d, a, b, keep, line);
  }
};
inline void wgmma_fence(int line = __builtin_LINE()) { emu::wgmma_fence(line); }
inline void wgmma_commit(int line = __builtin_LINE()) { emu::wgmma_commit(line); }
template <int kPending>
void wgmma_wait(int line = __builtin_LINE()) {
  emu::wgmma_wait(kPending, line);
}
template <int kCount>
void hold_registers(float (&)[kCount]) {}
#else
RF_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RF_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
RF_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving uses of the accumulators across the waits.
template <int kCount>
RF_DEVICE void hold_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The operand lists, in runs of 16 registers: their numbers in the text, then the registers.
#define RF_TEXT_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define RF_TEXT_1 RF_TEXT_0 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define RF_TEXT_2 RF_TEXT_1 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define RF_TEXT_3 RF_TEXT_2 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define RF_TEXT_4 RF_TEXT_3 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define RF_TEXT_5 RF_TEXT_4 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define RF_TEXT_6 \
  RF_TEXT_5 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define RF_TEXT_7 \
  RF_TEXT_6 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
// 56 registers: N of 112, a row of the stem's convolution
#define RF_TEXT_56 RF_TEXT_2 ",%48,%49,%50,%51,%52,%53,%54,%55"
// 104, 108 and 116 registers: N of 208, 216 and 232, which the rows of tap_shift.h fill best
#define RF_TEXT_104 RF_TEXT_5 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define RF_TEXT_108 RF_TEXT_104 ",%104,%105,%106,%107"
#define RF_TEXT_116 RF_TEXT_6 ",%112,%113,%114,%115"
#define RF_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define RF_16(i) RF_4(i), RF_4(i + 4), RF_4(i + 8), RF_4(i + 12)
#define RF_LIST_0 RF_16(0)
#define RF_LIST_1 RF_LIST_0, RF_16(16)
#define RF_LIST_2 RF_LIST_1, RF_16(32)
#define RF_LIST_3 RF_LIST_2, RF_16(48)
#define RF_LIST_4 RF_LIST_3, RF_16(64)
#define RF_LIST_5 RF_LIST_4, RF_16(80)
#define RF_LIST_6 RF_LIST_5, RF_16(96)
#define RF_LIST_7 RF_LIST_6, RF_16(112)
#define RF_LIST_56 RF_LIST_2, RF_4(48), RF_4(52)
#define RF_LIST_104 RF_LIST_5, RF_4(96), RF_4(100)
#define RF_LIST_108 RF_LIST_104, RF_4(104)
#define RF_LIST_116 RF_LIST_6, RF_4(112)

// N, its last run of registers, and the numbers of the operands behind the registers.
#define RF_WGMMA(T, TYPE, N, RUN, A, B, KEEP)                                             \
  template <>                                                                             \
  struct Wgmma<T, N> {                                                                    \
    static RF_DEVICE void issue(float (&d)[N / 2], uint64_t a, uint64_t b, bool keep) {   \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %" KEEP                            \
                   ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                   " {" RF_TEXT_##RUN "}, %" A ", %" B ", p, 1, 1, 0, 0;\n}\n"            \
                   : RF_LIST_##RUN                                                        \
                   : "l"(a), "l"(b), "r"(int(keep)));                                     \
    }                                                                                     \
  };
#define RF_WGMMA_SIZES(T, TYPE)                    \
  RF_WGMMA(T, TYPE, 32, 0, "16", "17", "18")       \
  RF_WGMMA(T, TYPE, 64, 1, "32", "33", "34")       \
  RF_WGMMA(T, TYPE, 112, 56, "56", "57", "58")     \
  RF_WGMMA(T, TYPE, 128, 3, "64", "65", "66")      \
  RF_WGMMA(T, TYPE, 192, 5, "96", "97", "98")      \
  RF_WGMMA(T, TYPE, 208, 104, "104", "105", "106") \
  RF_WGMMA(T, TYPE, 216, 108, "108", "109", "110") \
  RF_WGMMA(T, TYPE, 232, 116, "116", "117", "118") \
  RF_WGMMA(T, TYPE, 256, 7, "128", "129", "130")
RF_WGMMA_SIZES(__half, "f16")
RF_WGMMA_SIZES(__nv_bfloat16, "bf16")
#endif

}  // namespace resnet_fused::sm90
