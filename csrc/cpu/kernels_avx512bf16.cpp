// All kernels compiled for AVX-512 with bfloat16 products (Cooper Lake, Sapphire Rapids, Zen 4 and
// later).
//
// Every header with inline functions is included before the pragma: compiled for the wider set, one
// of them could be the copy that the linker keeps for the whole library, and crash on an older CPU.
#include <immintrin.h>

#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/winograd_points.h"

#define RESNET_FUSED_ISA_NAMESPACE avx512bf16
#define RESNET_FUSED_BF16_PRODUCTS
// gcc 12 takes the deliberately undefined operand inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#ifndef RESNET_FUSED_EMULATED_AVX512  // cpu/emulate/avx512.h
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#else
#pragma GCC target("avx2,fma,f16c")
#endif

// clang-format off: the order matters
#include "cpu/vec_avx512.h"
#include "cpu/kernels_body.h"
// clang-format on

namespace resnet_fused {

constexpr Kernels kAvx512Bf16Kernels = avx512bf16::table("avx512bf16");

}  // namespace resnet_fused
