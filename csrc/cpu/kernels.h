// The kernels of one instruction set, and the choice among the sets.
#pragma once

#include <string>

#include "cpu/direct.h"
#include "cpu/head.h"
#include "cpu/peak.h"
#include "cpu/pointwise.h"
#include "cpu/pool.h"
#include "cpu/stem.h"
#include "cpu/winograd.h"

namespace resnet_fused {

struct Kernels {
  const char* isa;
  bool bf16_products;  // runs the plans that multiply bfloat16
  void (*direct_job)(const ConvArgs&, const DirectJob&, float* scratch);
  void (*winograd_job)(const ConvArgs&, const WinogradJob&, float* scratch);
  void (*stem_job)(const ConvArgs&, const StemJob&, float* scratch);
  void (*stem_join)(const ConvArgs&, const StemJob&, const float* edge);
  void (*epilogue)(const EpilogueArgs&, int64_t begin, int64_t end);
  void (*add_relu)(const AddReluArgs&, int64_t begin, int64_t end);
  void (*max_pool)(const PoolArgs&, int64_t begin, int64_t end);
  void (*mean)(const MeanArgs&, int64_t begin, int64_t end);
  void (*linear)(const LinearArgs&, int64_t begin, int64_t end);
  // kChains chains of `steps` multiply-adds of `lanes` floats (peak.h), and the same of `lanes`
  // pairs of bfloat16, null without bf16_products.
  void (*multiply_chains)(int64_t steps);
  void (*multiply_chains_bf16)(int64_t steps);
  int64_t lanes;
};

extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

// The kernels in use: RESNET_FUSED_ISA (scalar, avx2, avx512, avx512bf16) at the first call, else
// the widest that this CPU has. Throws if the variable names a set that is unknown or that the CPU
// lacks.
const Kernels& kernels();

// Changes the set in use for the whole process; "" chooses as at the first call.
void use_isa(const std::string& isa);

// The sets of kernels that this CPU can run, narrowest first, and whether it multiplies bfloat16 in
// tiles, which PyTorch's kernels do: "scalar avx2 avx512 avx512bf16 amx_bf16" at most.
std::string cpu_features();

}  // namespace resnet_fused
