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
#include "cpu/gemm_body.h"
#include "cpu/direct_body.h"
#include "cpu/head_body.h"
#include "cpu/peak_body.h"
#include "cpu/pointwise_body.h"
#include "cpu/pool_body.h"
#include "cpu/stem_body.h"
#include "cpu/winograd_body.h"
// clang-format on

namespace resnet_fused {

const Kernels kAvx512Bf16Kernels = {
    "avx512bf16",
    true,
    avx512bf16::direct_job,
    avx512bf16::winograd_job,
    avx512bf16::stem_job,
    avx512bf16::stem_join,
    avx512bf16::epilogue,
    avx512bf16::add_relu,
    avx512bf16::max_pool,
    avx512bf16::mean,
    avx512bf16::linear,
    avx512bf16::multiply_chains<avx512bf16::FloatProduct>,
    avx512bf16::multiply_chains<avx512bf16::Bf16Product>,
    avx512bf16::Vec::kWidth,
};

}  // namespace resnet_fused
