// Independent chains of multiply-adds, written once over `Vec` and the products of gemm_body.h.
#include "cpu/peak.h"

#ifndef RESNET_FUSED_VECTOR_OPERAND
#define RESNET_FUSED_VECTOR_OPERAND "x"  // a register; emulated ones are in memory
#endif

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// `steps` multiply-adds in each of kChains registers. The empty asm "changes" an operand before
// each of them, so that none is shared, taken out of the loop or left out.
template <class Product>
static void multiply_chains(int64_t steps) {
  Reg operand = Vec::set1(1.0f);  // as bfloat16 the pair (0, 1)
  Reg sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = Vec::zero();
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      __asm__ volatile("" : "+" RESNET_FUSED_VECTOR_OPERAND(operand));
      sum[i] = Product::multiply_add(operand, operand, sum[i]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) __asm__ volatile("" : : RESNET_FUSED_VECTOR_OPERAND(sum[i]));
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
