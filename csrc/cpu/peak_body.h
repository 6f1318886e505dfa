// Independent chains of multiply-adds, written once over `Vec`.
#include "cpu/peak.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// `steps` multiply-adds in each of kChains registers; returns a value that all of them end in, which
// keeps the compiler from leaving any out. The sum is the multiplied operand: without an FMA
// instruction a product of constants would be taken out of the loop.
static float multiply_chains(int64_t steps) {
  const Reg half = Vec::set1(0.5f);
  Reg sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = Vec::set1(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = Vec::fma(sum[i], half, half);
  }
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) sum[0] = Vec::add(sum[0], sum[i]);
  float lanes[Vec::kWidth];
  Vec::store(lanes, sum[0]);
  return lanes[0];
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
