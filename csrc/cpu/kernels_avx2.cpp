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

const Kernels kAvx2Kernels = {
    "avx2",           false,
    avx2::direct_job, avx2::winograd_job,
    avx2::stem_job,   avx2::stem_join,
    avx2::epilogue,   avx2::add_relu,
    avx2::max_pool,   avx2::mean,
    avx2::linear,     avx2::multiply_chains<avx2::FloatProduct>,
    nullptr,          avx2::Vec::kWidth,
};

}  // namespace resnet_fused
