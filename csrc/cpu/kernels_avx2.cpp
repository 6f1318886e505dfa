// All kernels compiled for AVX2, FMA and F16C.
//
// Every header with inline functions is included before the pragma: compiled for the wider set, one
// of them could be the copy that the linker keeps for the whole library, and crash on an older CPU.
#include <immintrin.h>

#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/winograd_points.h"

#define RESNET_FUSED_ISA_NAMESPACE avx2
#pragma GCC target("avx2,fma,f16c")

// clang-format off: the order matters
#include "cpu/vec_avx2.h"
#include "cpu/kernels_body.h"
// clang-format on

namespace resnet_fused {

constexpr Kernels kAvx2Kernels = avx2::table("avx2");

}  // namespace resnet_fused
