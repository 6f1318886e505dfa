// All kernels compiled for the baseline instruction set.
#include "cpu/half.h"
#include "cpu/kernels.h"
#include "cpu/winograd_points.h"

#define RESNET_FUSED_ISA_NAMESPACE scalar

// clang-format off: the order matters
#include "cpu/vec_scalar.h"
#include "cpu/kernels_body.h"
// clang-format on

namespace resnet_fused {

constexpr Kernels kScalarKernels = scalar::table("scalar");

}  // namespace resnet_fused
