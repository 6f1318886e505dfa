// Independent chains of multiply-adds, written once over `Vec`.
#include "cpu/peak.h"

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// One multiply-add. The sum is the multiplied operand: without an FMA instruction a product of
// constants would be taken out of the loop.
struct FloatProduct {
  Reg half = Vec::set1(0.5f);
  Reg operator()(Reg sum) const { return Vec::fma(sum, half, half); }
};

#ifdef RESNET_FUSED_BF16_PRODUCTS
// The pairs are (1, -1) and (1, 1): every product counts, and no sum runs off to infinity.
struct Bf16Product {
  Reg a = Vec::pair_bf16(Vec::set1(1.0f), Vec::set1(-1.0f));
  Reg b = Vec::pair_bf16(Vec::set1(1.0f), Vec::set1(1.0f));
  Reg operator()(Reg sum) const { return Vec::dot_bf16(a, b, sum); }
};
#endif

// `steps` products in each of kChains registers; returns a value that all of them end in, which
// keeps the compiler from leaving any out.
template <class Product>
static float run_chains(int64_t steps) {
  const Product product;
  Reg sum[kChains];
#pragma GCC unroll 12
  for (int i = 0; i < kChains; ++i) sum[i] = Vec::set1(static_cast<float>(i));
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sum[i] = product(sum[i]);
  }
#pragma GCC unroll 12
  for (int i = 1; i < kChains; ++i) sum[0] = Vec::add(sum[0], sum[i]);
  float lanes[Vec::kWidth];
  Vec::store(lanes, sum[0]);
  return lanes[0];
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
