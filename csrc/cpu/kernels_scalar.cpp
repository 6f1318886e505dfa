// All kernels compiled for the baseline instruction set.
#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/winograd_points.h"

#define RESNET_FUSED_ISA_NAMESPACE scalar

// clang-format off: the order matters
#include "cpu/vec_scalar.h"
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

const Kernels kScalarKernels = {
    "scalar",
    false,
    scalar::direct_job,
    scalar::winograd_job,
    scalar::stem_job,
    scalar::stem_join,
    scalar::epilogue,
    scalar::add_relu,
    scalar::max_pool,
    scalar::mean,
    scalar::linear,
    scalar::multiply_chains<scalar::FloatProduct>,
    nullptr,
    scalar::Vec::kWidth,
};

}  // namespace resnet_fused
