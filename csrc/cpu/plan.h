// Plans: what each demands of a convolution, and the layout of its packed weights.
#pragma once

#include <string>
#include <vector>

#include "check.h"
#include "conv.h"
#include "cpu/direct.h"
#include "cpu/stem.h"
#include "cpu/winograd.h"
#include "cpu/winograd_points.h"

namespace resnet_fused {

struct PlanInfo {
  Plan plan;
  const char* name;
  int64_t pack;           // elements of the reduction in a 32-bit word of the packed weights
  WinogradTiling tiling;  // all zero: not a Winograd plan
  bool raw = false;       // Winograd of weights that are transformed when they are used

  bool is_winograd() const { return tiling.out > 0; }
};

template <class F>
constexpr WinogradTiling tiling_of() {
  return {F::kOut, WinogradSizes<F>::kPoints, F::kStride};
}

inline constexpr PlanInfo kPlans[] = {
    {Plan::kDirect, "direct", 1, {}},
    {Plan::kWinograd4, "winograd4", 1, tiling_of<Winograd4>()},
    {Plan::kWinograd4Raw, "winograd4_raw", 1, tiling_of<Winograd4>(), true},
    {Plan::kWinograd2, "winograd2", 1, tiling_of<Winograd2>()},
    {Plan::kWinograd5, "winograd5", 1, tiling_of<Winograd5>()},
    {Plan::kWinograd4S2, "winograd4s2", 1, tiling_of<Winograd4S2>()},
    {Plan::kWinograd2S2, "winograd2s2", 1, tiling_of<Winograd2S2>()},
    {Plan::kDirectBf16, "direct_bf16", 2, {}},
    {Plan::kWinograd2Bf16, "winograd2_bf16", 2, tiling_of<Winograd2>()},
    {Plan::kWinograd2S2Bf16, "winograd2s2_bf16", 2, tiling_of<Winograd2S2>()},
    {Plan::kStem, "stem", 1, {}},
    {Plan::kTorch, "torch", 1, {}},
};

constexpr bool in_order_of_plans() {
  int plan = 0;
  for (const PlanInfo& info : kPlans) {
    if (static_cast<int>(info.plan) != plan++) return false;
  }
  return true;
}
static_assert(in_order_of_plans(), "kPlans is indexed by Plan");

inline const PlanInfo& plan_info(Plan plan) { return kPlans[static_cast<int>(plan)]; }

inline const PlanInfo& parse_plan(const OpName& op, const std::string& name) {
  std::string names;
  for (const PlanInfo& info : kPlans) {
    if (name == info.name) return info;
    names += (names.empty() ? "\"" : " or \"") + std::string(info.name) + "\"";
  }
  fail(op, ": plan must be ", names, ", got \"", name, "\"");
}

// The shape of the packed weights; a last dimension of 2 where words hold pairs.
inline std::vector<int64_t> packed_shape(const PlanInfo& plan, const ConvShape& s) {
  if (plan.plan == Plan::kTorch) {
    return {s.out_channels, s.group_in(), s.kernel_h, s.kernel_w};
  }
  std::vector<int64_t> shape;
  if (plan.raw) {
    shape = {panels_of(s.out_channels), s.in_channels, kKernelTaps, kPanel};
  } else if (plan.is_winograd()) {
    const int64_t points = plan.tiling.points * plan.tiling.points;
    shape = {panels_of(s.out_channels), points, window_words(s, plan.pack), kPanel};
  } else if (plan.plan == Plan::kStem) {
    shape = {panels_of(s.out_channels), kStemRows, stem_reduction(s), kPanel};
  } else {
    const Segments segments(s, plan.pack);
    shape = {s.groups * panels_of(s.group_out()), segments.count * segments.words(), kPanel};
  }
  if (plan.pack > 1) shape.push_back(plan.pack);
  return shape;
}

inline void check_plan_dtype(const OpName& op, const PlanInfo& plan, DType dtype) {
  const char* taken = plan.pack > 1 ? "bfloat16" : "float32, bfloat16 or float16";
  const char* got = dtype == DType::kFloat64   ? "float64"
                    : dtype == DType::kFloat32 ? "float32"
                                               : "float16";
  const bool fits = plan.pack > 1 ? dtype == DType::kBFloat16 : dtype != DType::kFloat64;
  check(fits, op, ": plan \"", plan.name, "\" takes ", taken, ", got ", got);
}

// What the plan demands of the weights, checked when they are packed and when they are used.
inline void check_plan_weight(const OpName& op, const PlanInfo& plan, const ConvShape& s) {
  if (plan.plan == Plan::kStem) {
    check(s.kernel_h == kStemKernel && s.groups == 1, op, ": plan \"", plan.name,
          "\" takes kernels of ", kStemKernel, " rows in one group, got ", s.kernel_h, " x ",
          s.kernel_w, " in ", s.groups);
  }
  if (!plan.is_winograd()) return;
  check(s.kernel_h == 3 && s.kernel_w == 3 && s.groups == 1, op, ": plan \"", plan.name,
        "\" takes 3 x 3 kernels in one group, got ", s.kernel_h, " x ", s.kernel_w, " in ",
        s.groups);
}

inline void check_plan_geometry(const OpName& op, const PlanInfo& plan, const ConvShape& s) {
  const bool stem = plan.plan == Plan::kStem;
  if (!stem && !plan.is_winograd()) return;
  const int64_t stride = stem ? kStemStride : plan.tiling.stride;
  check(s.stride_h == stride && (stem || s.stride_w == stride) && s.dilation_h == 1 &&
            s.dilation_w == 1,
        op, ": plan \"", plan.name, "\" takes stride ", stride, stem ? " along the rows" : "",
        " and dilation 1, got stride ", shape_text(std::vector<int64_t>{s.stride_h, s.stride_w}),
        " and dilation ", shape_text(std::vector<int64_t>{s.dilation_h, s.dilation_w}));
}

}  // namespace resnet_fused
