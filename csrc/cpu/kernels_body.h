// All kernels of one instruction set as its table: the last that a kernels_*.cpp includes, behind
// its pragma and its Vec.
// clang-format off: the order matters
#include "cpu/gemm_body.h"
#include "cpu/walk_body.h"
#include "cpu/direct_body.h"
#include "cpu/head_body.h"
#include "cpu/peak_body.h"
#include "cpu/pointwise_body.h"
#include "cpu/pool_body.h"
#include "cpu/stem_body.h"
#include "cpu/winograd_transform_body.h"
#include "cpu/winograd_input_body.h"
#include "cpu/winograd_raw_body.h"
#include "cpu/winograd_output_body.h"
#include "cpu/winograd_body.h"
// clang-format on

namespace resnet_fused {
namespace RESNET_FUSED_ISA_NAMESPACE {

// Each by its name: several have the same type, so that two in each other's places would compile.
static constexpr Kernels table(const char* isa) {
  Kernels kernels = {};
  kernels.isa = isa;
  kernels.direct_job = direct_job;
  kernels.winograd_job = winograd_job;
  kernels.stem_job = stem_job;
  kernels.stem_join = stem_join;
  kernels.epilogue = epilogue;
  kernels.add_relu = add_relu;
  kernels.max_pool = max_pool;
  kernels.mean = mean;
  kernels.linear = linear;
  kernels.multiply_chains = multiply_chains<FloatProduct>;
#ifdef RESNET_FUSED_BF16_PRODUCTS
  kernels.bf16_products = true;
  kernels.multiply_chains_bf16 = multiply_chains<Bf16Product>;
#endif
  kernels.lanes = Vec::kWidth;
  return kernels;
}

}  // namespace RESNET_FUSED_ISA_NAMESPACE
}  // namespace resnet_fused
